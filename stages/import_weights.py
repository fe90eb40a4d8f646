"""Weights that were trained elsewhere, in place of a pretraining: a released Mugs checkpoint, or a ViT of timm."""

from typing import Literal

from pydantic import Field

from pipeline.spec import Resources, Runtime, StageConfig, StageContext, StageOutput


class ImportConfig(StageConfig):
    """What the weights are said to be, and their SHA-256 where given, is their identity; where they lie is not.

    `source: mugs` reads a released `.pth`, full or backbone only, of an `arch` of ours (vit_s16, vit_b16, vit_l16).
    `source: timm` reads a `.pth` or `.safetensors` of the plain ViT that timm calls `arch`; `file: download` lets timm
    fetch its own. `method`, `epochs` and `seed` go into result rows; tables find their row by them.
    """

    source: Literal["mugs", "timm"] = "mugs"
    arch: str = Field(min_length=1)
    method: str = Field("mugs", min_length=1)
    epochs: int = Field(ge=0)
    seed: int = 0
    network: Literal["teacher", "student"] = "teacher"
    sha256: str | None = Field(None, pattern="^[0-9a-f]{64}$")
    file: str | None = Runtime(None, required_at_run=True)

    def misfit(self, resources: Resources) -> str | None:
        """More than one process."""
        return f"weights are imported by one rank, not {resources.ranks}" if resources.ranks > 1 else None


def run(ctx: StageContext, cfg: ImportConfig) -> StageOutput:
    """Output `teacher`: the backbone in our format, whose tensors timm loads as they are."""
    from dataclasses import asdict

    from mugs.foreign_weights import import_released, import_timm
    from mugs.weights import save_backbone

    load = import_timm if cfg.source == "timm" else import_released
    found = load(cfg.arch, cfg.file or "", network=cfg.network, sha256=cfg.sha256)
    shape, target = asdict(found.vit.config), ctx.run_dir / "weights" / "teacher.safetensors"
    save_backbone(target, dict(found.vit.state_dict()), {"arch": shape, "weights": "teacher"})
    info = {
        "method": cfg.method,
        "arch": cfg.arch,
        "shape": shape,
        "epochs": cfg.epochs,
        "seed": cfg.seed,
        "sha256": found.sha256,
        "discarded": list(found.discarded),
    }
    return StageOutput(outputs={"teacher": target}, info=info)
