"""Weights that were trained elsewhere, in place of a pretraining: a released Mugs checkpoint, or a ViT of timm."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

from pydantic import Field, NonNegativeInt

from pipeline.settings import RequiredAtRun
from pipeline.spec import Resources, StageConfig
from pipeline.stage import StageContext, StageOutput

if TYPE_CHECKING:
    from mugs.weights.foreign import Imported


@dataclass(frozen=True, kw_only=True)
class ImportConfig(StageConfig):
    """What the weights are said to be, and their SHA-256 where given, is their identity; where they lie is not.

    `source: mugs` reads a released `.pth`, full or backbone only, of an `arch` of ours (vit_s16, vit_b16, vit_l16).
    `source: timm` reads a `.pth` or `.safetensors` of the plain ViT that timm calls `arch`; `file: download` lets timm
    fetch its own. `source: ours` reads a `.safetensors` that a pretraining or the command `import` wrote. `method`,
    `epochs` and `seed` go into result rows; tables find their row by them.
    """

    # Who wrote the file: the release (`mugs`), timm, or a pretraining of ours.
    source: Literal["mugs", "timm", "ours"] = "mugs"
    # Name of the architecture, for `timm` as timm calls it.
    arch: Annotated[str, Field(min_length=1)]
    # Method in result rows.
    method: Annotated[str, Field(min_length=1)] = "mugs"
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
        """Refuse a choice of network where the file has one."""
        if self.network != "teacher" and self.source != "mugs":
            raise ValueError(
                f"network {self.network}: only released checkpoints (source mugs) hold two "
                "networks; use network teacher"
            )

    def misfit(self, resources: Resources) -> str | None:
        """More than one process."""
        return (
            f"weights are imported by one rank, not {resources.ranks}"
            if resources.ranks > 1
            else None
        )


def preflight(cfg: ImportConfig, inputs: Mapping[str, StageConfig]) -> tuple[str, float]:
    """What the weights are. Raises WeightsError as `run` would, with the keys that do not fit."""
    if cfg.file == "download":
        return f"timm fetches {cfg.arch} when the run starts", 0.0
    found = load(cfg)
    return f"{cfg.arch} of {cfg.file}, all keys fit ({len(found.discarded)} left out)", float(
        found.nbytes
    )


def load(cfg: ImportConfig) -> "Imported":
    """The backbone. Raises WeightsError naming the file and the keys."""
    from mugs.weights.foreign import import_ours, import_released, import_timm

    if cfg.source == "mugs":
        return import_released(cfg.arch, cfg.file or "", network=cfg.network, sha256=cfg.sha256)
    load_single = {"timm": import_timm, "ours": import_ours}[cfg.source]
    return load_single(cfg.arch, cfg.file or "", sha256=cfg.sha256)


def save(found: "Imported", path: Path) -> None:
    """Write the backbone in our format."""
    from dataclasses import asdict

    from mugs.weights.backbone_file import write_backbone_file

    write_backbone_file(
        path, dict(found.vit.state_dict()), {"arch": asdict(found.vit.config), "weights": "teacher"}
    )


def run(ctx: StageContext, cfg: ImportConfig) -> StageOutput:
    """Output `teacher`: the backbone in our format, whose tensors timm loads as they are."""
    from dataclasses import asdict

    found, target = load(cfg), ctx.run_dir / "weights" / "teacher.safetensors"
    save(found, target)
    info = {
        "method": cfg.method,
        "arch": cfg.arch,
        "shape": asdict(found.vit.config),
        "epochs": cfg.epochs,
        "seed": cfg.seed,
        "sha256": found.sha256,
        "discarded": list(found.discarded),
    }
    return StageOutput(outputs={"teacher": target}, info=info)
