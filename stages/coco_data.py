"""COCO where it lies: files, sizes, categories and outlines checked, before GPUs are spent on it."""

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pydantic import Field

from pipeline.spec import Runtime, StageConfig, StageContext, StageOutput

if TYPE_CHECKING:
    from mugs.transfer.detection.layout import CocoLayout

BUILTIN_DIGITS = "builtin:digit_scenes"


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

    if cfg.data_dir == BUILTIN_DIGITS or cfg.data_dir is None:
        return "scenes of the digits that come with scikit-learn", 0.0
    splits = check_coco(Path(cfg.data_dir).expanduser().absolute(), expected(cfg), threads=cfg.threads)
    return ", ".join(f"{len(split):,} {name} images" for name, split in splits.items()), 0.0


def expected(cfg: CocoDataConfig) -> "CocoLayout":
    """What the data set is said to hold, or known to."""
    from mugs.transfer.detection.layout import CocoLayout

    images = {"train": cfg.num_train_images, "val": cfg.num_val_images}
    return CocoLayout(cfg.num_classes, images).or_known(cfg.dataset)


def run(ctx: StageContext, cfg: CocoDataConfig) -> StageOutput:
    """Check both splits; output `layout` says where they lie."""
    import json

    from mugs.atomic import write_text_atomic
    from mugs.engine.progress import Progress
    from mugs.transfer.detection.digits import materialize_coco
    from mugs.transfer.detection.layout import check_coco

    if cfg.data_dir is None:
        raise ValueError("data_dir is not set")
    outputs: dict[str, Path] = {"layout": ctx.run_dir / "layout.json"}
    root = Path(cfg.data_dir).expanduser().absolute()
    if cfg.data_dir == BUILTIN_DIGITS:
        root = outputs["scenes"] = ctx.run_dir / "scenes"
        materialize_coco(root, train=cfg.num_train_images or 200, val=cfg.num_val_images or 50)
    progress = Progress("check", 1, unit="images", path=ctx.run_dir / "progress.json")

    def report(done: int, total: int) -> None:
        progress.total = total
        progress.update(done)

    splits = check_coco(root, expected(cfg), threads=cfg.threads, report=report)
    progress.close()
    facts: dict[str, Any] = {name: {"images": len(split)} for name, split in splits.items()}
    write_text_atomic(outputs["layout"], json.dumps({"root": str(root), **facts}, indent=1))
    info = {"dataset": cfg.dataset, "num_classes": len(splits["train"].categories)}
    return StageOutput(outputs=outputs, info=info)
