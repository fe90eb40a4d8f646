"""ADE20K where it lies: numbers, sizes and labels of all its files checked, before GPUs are spent on it."""

from pathlib import Path
from typing import Any

from pydantic import Field

from pipeline.spec import Runtime, StageConfig, StageContext, StageOutput
from stages.located import write_root

BUILTIN_SCENES = "builtin:digit_scenes"


class Ade20kDataConfig(StageConfig):
    """What the data set is. Its name and counts are its identity; where it lies does not enter the run id.

    `data_dir` holds `images/` and `annotations/` with `training/` and `validation/` each. `reduce_zero`: 0 in an
    annotation is void and class 0 is written as 1. The built-in scenes have a background and `num_classes` - 1 digits.
    """

    dataset: str = Field("ade20k", min_length=1)
    num_classes: int = Field(150, ge=2, le=254)
    num_train_images: int = Field(20210, ge=1)
    num_val_images: int = Field(2000, ge=1)
    reduce_zero: bool = True
    data_dir: str | None = Runtime(None, required_at_run=True)
    threads: int = Runtime(8, ge=1)


def run(ctx: StageContext, cfg: Ade20kDataConfig) -> StageOutput:
    """Check both splits; output `layout` says where they lie."""
    from mugs.engine.progress import Progress
    from mugs.transfer.digit_scenes import materialize_scenes
    from mugs.transfer.segmentation.scenes import check_scenes

    if cfg.data_dir is None:
        raise ValueError("data_dir is not set")
    counts = {"train": cfg.num_train_images, "val": cfg.num_val_images}
    outputs: dict[str, Path] = {}
    root = Path(cfg.data_dir).expanduser().absolute()
    if cfg.data_dir == BUILTIN_SCENES:
        root = outputs["scenes"] = ctx.run_dir / "scenes"
        materialize_scenes(root, **counts, classes=cfg.num_classes - 1)
    progress = Progress("check", sum(counts.values()), unit="images", path=ctx.run_dir / "progress.json")
    check_scenes(
        root,
        counts,
        num_classes=cfg.num_classes,
        reduce_zero=cfg.reduce_zero,
        threads=cfg.threads,
        report=progress.update,
    )
    progress.close()
    outputs["layout"] = write_root(ctx.run_dir, root)
    info: dict[str, Any] = {"dataset": cfg.dataset, "num_classes": cfg.num_classes, "reduce_zero": cfg.reduce_zero}
    if cfg.data_dir == BUILTIN_SCENES:
        info["class_names"] = ["ground", *(f"digit {digit}" for digit in range(cfg.num_classes - 1))]
    return StageOutput(outputs=outputs, info=info)
