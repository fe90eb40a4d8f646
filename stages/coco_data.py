"""COCO where it lies: files, sizes, categories and outlines checked, before GPUs are spent on it."""

from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Annotated

from pydantic import Field, PositiveInt

from pipeline.settings import RequiredAtRun, Runtime
from pipeline.spec import Resources, StageConfig, StageSpec
from pipeline.stage import StageContext, StageOutput
from stages.shared.external_data import Report, check_external_data, register_external_data


@dataclass(frozen=True, kw_only=True)
class CocoDataConfig(StageConfig):
    """What the data set is. Its name and counts are its identity; where it lies does not enter the run id.

    `data_dir` holds `train2017/`, `val2017/` and `annotations/instances_{train,val}2017.json`. Of coco2017 the counts
    are known; others are checked where they are given.
    """

    dataset: Annotated[str, Field(min_length=1)] = "coco2017"
    num_classes: PositiveInt | None = None
    num_train_images: PositiveInt | None = None
    num_val_images: PositiveInt | None = None
    data_dir: RequiredAtRun[str | None] = None
    threads: Runtime[PositiveInt] = 8


def preflight(cfg: CocoDataConfig, inputs: Mapping[str, StageConfig]) -> tuple[str, float]:
    """Number of images and categories; nothing is written. Raises SourceError as `run` would."""
    return check_external_data(cfg.data_dir, "scenes", partial(check_coco_files, cfg))


def check_coco_files(cfg: CocoDataConfig, root: Path, report: Report) -> dict[str, int]:
    """How many images and categories there are. Raises SourceError naming what differs from what is said or known."""
    from mugs.data.dense.coco import check_coco
    from mugs.data.sources.expected import ExpectedCounts

    images = {"train": cfg.num_train_images, "val": cfg.num_val_images}
    expected = ExpectedCounts(cfg.num_classes, images).or_known(cfg.dataset)
    splits = check_coco(root, expected, threads=cfg.threads, report=report)
    counts = {f"{name} images": len(split) for name, split in splits.items()}
    return {**counts, "categories": len(splits["train"].categories)}


def run(ctx: StageContext, cfg: CocoDataConfig) -> StageOutput:
    """Check both splits; output `layout` says where they lie."""
    from mugs.data.mini.coco import materialize_coco

    materialize = partial(
        materialize_coco, train=cfg.num_train_images or 200, val=cfg.num_val_images or 50
    )
    outputs, counts = register_external_data(
        ctx, cfg.data_dir, "scenes", materialize, partial(check_coco_files, cfg)
    )
    return StageOutput(
        outputs=outputs, info={"dataset": cfg.dataset, "num_classes": counts["categories"]}
    )


SPEC = StageSpec(
    name="coco_data",
    config=CocoDataConfig,
    entrypoint="stages.coco_data:run",
    preflight="stages.coco_data:preflight",
    resources=Resources(gpu=False, cpus_per_rank=16, hours=1.0),
)
