"""What a reproduction says of weights that were trained elsewhere."""

from dataclasses import dataclass
from typing import Annotated, ClassVar, Literal

from pydantic import Field, NonNegativeInt

from pipeline.settings import RequiredAtRun
from pipeline.spec import Label, Resources, StageConfig


@dataclass(frozen=True, kw_only=True)
class ImportConfig(StageConfig):
    """Weights from outside. What they are, and their SHA-256 if given, is their identity.

    `source: mugs` reads a released `.pth`, full or backbone only, of one of our architectures
    (vit_s16, vit_b16, vit_l16). `source: timm` reads a `.pth` or `.safetensors` of the plain ViT
    that timm calls `arch`; with `file: download`, timm fetches its own. `source: ours` reads a
    `.safetensors` that a pretraining or the command `import` wrote. `method`, `epochs` and `seed`
    go into result rows; tables find their row by them.
    """

    one_rank: ClassVar[bool] = True

    # Who wrote the file: the release (`mugs`), timm, or a pretraining of ours.
    source: Literal["mugs", "timm", "ours"] = "mugs"
    # Name of the architecture, for `timm` as timm calls it.
    arch: Annotated[str, Field(min_length=1)]
    # Method in result rows.
    method: Label = "mugs"
    # Epochs of the pretraining, in result rows.
    epochs: NonNegativeInt
    seed: int = 0
    # Which network of a released checkpoint that has both.
    network: Literal["teacher", "student"] = "teacher"
    # Expected SHA-256 of the file.
    sha256: Annotated[str, Field(pattern="^[0-9a-f]{64}$")] | None = None
    # Path of the file, or `download` for what timm can fetch.
    file: RequiredAtRun[str | None] = None

    def __post_init__(self) -> None:
        """Refuse a choice of network if the file has only one."""
        if self.network != "teacher" and self.source != "mugs":
            raise ValueError(
                f"network {self.network}: only released checkpoints (source mugs) hold two "
                "networks; use network teacher"
            )

    def check_resources(self, resources: Resources) -> None:
        """Require a single process."""
        if resources.ranks > 1:
            raise ValueError(f"weights are imported by one rank, not {resources.ranks}")
