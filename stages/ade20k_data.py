"""ADE20K where it lies: numbers, sizes and labels of all its files checked, before GPUs are spent on it."""

from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

from pydantic import Field

from pipeline.spec import Runtime, StageConfig, StageContext, StageOutput
from stages.located import folder, locate, write_root


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


def preflight(cfg: Ade20kDataConfig, inputs: Mapping[str, StageConfig]) -> tuple[str, float]:
    """Number of images; nothing is written. Raises SourceError as `run` would."""
    root = folder(cfg.data_dir, "scenes")
    if root is None:
        return "scenes of the digits that come with scikit-learn", 0.0
    check(root, cfg, lambda done: None)
    return f"{cfg.num_train_images:,} train images, {cfg.num_val_images:,} val images", 0.0


def check(root: Path, cfg: Ade20kDataConfig, report: Callable[[int], None]) -> None:
    """Read all scenes. Raises SourceError naming what is wrong."""
    from mugs.transfer.segmentation.scenes import check_scenes

    counts = {"train": cfg.num_train_images, "val": cfg.num_val_images}
    classes, zero = cfg.num_classes, cfg.reduce_zero
    check_scenes(root, counts, num_classes=classes, reduce_zero=zero, threads=cfg.threads, report=report)


def run(ctx: StageContext, cfg: Ade20kDataConfig) -> StageOutput:
    """Check both splits; output `layout` says where they lie."""
    from mugs.engine.progress import Progress
    from mugs.transfer.digit_scenes import materialize_scenes

    counts = {"train": cfg.num_train_images, "val": cfg.num_val_images}
    materialize = partial(materialize_scenes, train=counts["train"], val=counts["val"], classes=cfg.num_classes - 1)
    root, outputs = locate(ctx, cfg.data_dir, "scenes", materialize)
    progress = Progress("check", sum(counts.values()), unit="images", path=ctx.run_dir / "progress.json")
    check(root, cfg, progress.update)
    progress.close()
    outputs["layout"] = write_root(ctx.run_dir, root)
    info: dict[str, Any] = {"dataset": cfg.dataset, "num_classes": cfg.num_classes, "reduce_zero": cfg.reduce_zero}
    if "scenes" in outputs:
        info["class_names"] = ["ground", *(f"digit {digit}" for digit in range(cfg.num_classes - 1))]
    return StageOutput(outputs=outputs, info=info)
