"""Import weights trained elsewhere, instead of a pretraining: released Mugs, or timm."""

from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING

from pipeline.reading import format_choices
from pipeline.spec import ConfigError, Resources, StageConfig, StageSpec
from pipeline.stage import StageContext, StageOutput
from stages.shared.imported_weights import ImportConfig

if TYPE_CHECKING:
    from mugs.weights.foreign import Imported


def check_weights_file(cfg: ImportConfig, inputs: Mapping[str, StageConfig]) -> tuple[str, float]:
    """Return what the weights are, and the bytes that importing them writes.

    Raises:
        WeightsError: names the keys that do not fit, as in a run.
    """
    # A login node may have no network, and the file may be large: only the run downloads it.
    if cfg.file == "download":
        return f"timm fetches {cfg.arch} when the run starts", 0.0
    found = load_foreign_weights(cfg)
    left_out = f"{len(found.discarded)} left out"
    return f"{cfg.arch} of {cfg.file}, all keys fit ({left_out})", float(found.nbytes)


def load_foreign_weights(cfg: ImportConfig) -> "Imported":
    """Return the backbone.

    Raises:
        ConfigError: there is no architecture of that name.
        WeightsError: names the file and the keys.
    """
    from mugs.models.config import ARCHITECTURES
    from mugs.weights.foreign import import_ours, import_released, import_timm

    file = cfg.file or ""
    if cfg.source != "timm" and cfg.arch not in ARCHITECTURES:
        raise ConfigError(
            f"arch: unknown architecture {cfg.arch!r}{format_choices(cfg.arch, ARCHITECTURES)}"
        )
    if cfg.source == "mugs":
        return import_released(cfg.arch, file, network=cfg.network, sha256=cfg.sha256)
    load_single = import_timm if cfg.source == "timm" else import_ours
    return load_single(cfg.arch, file, sha256=cfg.sha256)


def write_imported_weights(found: "Imported", path: Path) -> None:
    """Write the backbone in our format."""
    from mugs.weights.backbone_file import write_backbone_file

    # Evaluations ask for "teacher" by default, so a single network is stored under that name.
    meta = {"arch": asdict(found.vit.config), "weights": "teacher"}
    write_backbone_file(path, dict(found.vit.state_dict()), meta)


def run(ctx: StageContext, cfg: ImportConfig) -> StageOutput:
    """Return output `teacher`: the backbone in our format, whose tensors timm loads unchanged."""
    found = load_foreign_weights(cfg)
    target = ctx.run_dir / "weights" / "teacher.safetensors"
    write_imported_weights(found, target)
    return StageOutput(
        outputs={"teacher": target},
        # The same facts as of a pretraining, so that later stages need not tell the two apart.
        info={
            "method": cfg.method,
            "arch": cfg.arch,
            "shape": asdict(found.vit.config),
            "epochs": cfg.epochs,
            "seed": cfg.seed,
            "sha256": found.sha256,
            "discarded": list(found.discarded),
        },
    )


SPEC = StageSpec(
    name="import",
    config=ImportConfig,
    entrypoint="stages.import_weights:run",
    preflight="stages.import_weights:check_weights_file",
    resources=Resources(gpu=False, cpus_per_rank=4, hours=0.5),
)
