"""Weights that were trained elsewhere, in place of a pretraining: a released Mugs checkpoint, or a ViT of timm."""

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from pipeline.spec import Resources, StageConfig, StageSpec
from pipeline.stage import StageContext, StageOutput
from stages.shared.imported_weights import ImportConfig

if TYPE_CHECKING:
    from mugs.weights.foreign import Imported


def preflight(cfg: ImportConfig, inputs: Mapping[str, StageConfig]) -> tuple[str, float]:
    """What the weights are. Raises WeightsError as `run` would, with the keys that do not fit."""
    if cfg.file == "download":
        return f"timm fetches {cfg.arch} when the run starts", 0.0
    found = load_foreign_weights(cfg)
    return f"{cfg.arch} of {cfg.file}, all keys fit ({len(found.discarded)} left out)", float(
        found.nbytes
    )


def load_foreign_weights(cfg: ImportConfig) -> "Imported":
    """The backbone. Raises WeightsError naming the file and the keys."""
    from mugs.weights.foreign import import_ours, import_released, import_timm

    if cfg.source == "mugs":
        return import_released(cfg.arch, cfg.file or "", network=cfg.network, sha256=cfg.sha256)
    load_single = {"timm": import_timm, "ours": import_ours}[cfg.source]
    return load_single(cfg.arch, cfg.file or "", sha256=cfg.sha256)


def write_imported_weights(found: "Imported", path: Path) -> None:
    """Write the backbone in our format."""
    from dataclasses import asdict

    from mugs.weights.backbone_file import write_backbone_file

    write_backbone_file(
        path, dict(found.vit.state_dict()), {"arch": asdict(found.vit.config), "weights": "teacher"}
    )


def run(ctx: StageContext, cfg: ImportConfig) -> StageOutput:
    """Output `teacher`: the backbone in our format, whose tensors timm loads as they are."""
    from dataclasses import asdict

    found, target = load_foreign_weights(cfg), ctx.run_dir / "weights" / "teacher.safetensors"
    write_imported_weights(found, target)
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


SPEC = StageSpec(
    name="import",
    config=ImportConfig,
    entrypoint="stages.import_weights:run",
    preflight="stages.import_weights:preflight",
    resources=Resources(gpu=False, cpus_per_rank=4, hours=0.5),
)
