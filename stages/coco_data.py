"""COCO where it lies: files, sizes, categories and outlines checked, before GPUs are spent on it."""

from collections.abc import Mapping
from functools import partial
from typing import TYPE_CHECKING

from pydantic import Field

from pipeline.spec import Runtime, StageConfig, StageContext, StageOutput
from stages.located import folder, locate, write_root

if TYPE_CHECKING:
    from mugs.transfer.detection.layout import CocoLayout


class CocoDataConfig(StageConfig):
    """What the data set is. Its name and counts are its identity; where it lies does not enter the run id.

    `data_dir` holds `train2017/`, `val2017/` and `annotations/instances_{train,val}2017.json`. Of coco2017 the counts
    are known; others are checked where they are given.
    """

    dataset: str = Field("coco2017", min_length=1)
    num_classes: int | None = Field(None, ge=1)
    num_train_images: int | None = Field(None, ge=1)
    num_val_images: int | None = Field(None, ge=1)
    data_dir: str | None = Runtime(None, required_at_run=True)
    threads: int = Runtime(8, ge=1)


def preflight(cfg: CocoDataConfig, inputs: Mapping[str, StageConfig]) -> tuple[str, float]:
    """Number of images; nothing is written. Raises SourceError as `run` would."""
    from mugs.transfer.detection.layout import check_coco

    root = folder(cfg.data_dir, "scenes")
    if root is None:
        return "scenes of the digits that come with scikit-learn", 0.0
    splits = check_coco(root, expected(cfg), threads=cfg.threads)
    return ", ".join(f"{len(split):,} {name} images" for name, split in splits.items()), 0.0


def expected(cfg: CocoDataConfig) -> "CocoLayout":
    """What the data set is said to hold, or known to."""
    from mugs.transfer.detection.layout import CocoLayout

    images = {"train": cfg.num_train_images, "val": cfg.num_val_images}
    return CocoLayout(cfg.num_classes, images).or_known(cfg.dataset)


def run(ctx: StageContext, cfg: CocoDataConfig) -> StageOutput:
    """Check both splits; output `layout` says where they lie."""
    from mugs.engine.progress import Progress
    from mugs.transfer.detection.digits import materialize_coco
    from mugs.transfer.detection.layout import check_coco

    materialize = partial(materialize_coco, train=cfg.num_train_images or 200, val=cfg.num_val_images or 50)
    root, outputs = locate(ctx, cfg.data_dir, "scenes", materialize)
    progress = Progress("check", 1, unit="images", path=ctx.run_dir / "progress.json")

    def report(done: int, total: int) -> None:
        progress.total = total
        progress.update(done)

    splits = check_coco(root, expected(cfg), threads=cfg.threads, report=report)
    progress.close()
    outputs["layout"] = write_root(ctx.run_dir, root)
    info = {"dataset": cfg.dataset, "num_classes": len(splits["train"].categories)}
    return StageOutput(outputs=outputs, info=info)
