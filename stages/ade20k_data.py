"""ADE20K where it lies: numbers, sizes and labels of all its files checked, before GPUs are spent on it."""

from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Annotated, Any

from pydantic import Field, PositiveInt

from pipeline.settings import RequiredAtRun, Runtime
from pipeline.spec import Resources, StageConfig, StageSpec
from pipeline.stage import StageContext, StageOutput
from stages.shared.external_data import Report, check_external_data, register_external_data


@dataclass(frozen=True, kw_only=True)
class Ade20kDataConfig(StageConfig):
    """What the data set is. Its name and counts are its identity; where it lies does not enter the run id.

    `data_dir` holds `images/` and `annotations/` with `training/` and `validation/` each. `reduce_zero`: 0 in an
    annotation is void and class 0 is written as 1. The built-in scenes have a background and `num_classes` - 1 digits.
    """

    dataset: Annotated[str, Field(min_length=1)] = "ade20k"
    num_classes: Annotated[int, Field(ge=2, le=254)] = 150
    num_train_images: PositiveInt = 20210
    num_val_images: PositiveInt = 2000
    # 0 in an annotation is void, and class 0 is written as 1.
    reduce_zero: bool = True
    data_dir: RequiredAtRun[str | None] = None
    threads: Runtime[PositiveInt] = 8


def preflight(cfg: Ade20kDataConfig, inputs: Mapping[str, StageConfig]) -> tuple[str, float]:
    """Number of images; nothing is written. Raises SourceError as `run` would."""
    return check_external_data(cfg.data_dir, "scenes", partial(check_scene_files, cfg))


def check_scene_files(cfg: Ade20kDataConfig, root: Path, report: Report) -> dict[str, int]:
    """Read all scenes and count them. Raises SourceError naming what is wrong."""
    from mugs.data.dense.ade20k import check_scenes

    counts = {"train": cfg.num_train_images, "val": cfg.num_val_images}
    classes, zero = cfg.num_classes, cfg.reduce_zero
    check_scenes(
        root, counts, num_classes=classes, reduce_zero=zero, threads=cfg.threads, report=report
    )
    return {f"{split} images": count for split, count in counts.items()}


def run(ctx: StageContext, cfg: Ade20kDataConfig) -> StageOutput:
    """Check both splits; output `layout` says where they lie."""
    from mugs.data.mini.scenes_and_videos import materialize_scenes

    digits = cfg.num_classes - 1
    materialize = partial(
        materialize_scenes, train=cfg.num_train_images, val=cfg.num_val_images, classes=digits
    )
    outputs, _ = register_external_data(
        ctx, cfg.data_dir, "scenes", materialize, partial(check_scene_files, cfg)
    )
    info: dict[str, Any] = {
        "dataset": cfg.dataset,
        "num_classes": cfg.num_classes,
        "reduce_zero": cfg.reduce_zero,
    }
    if "scenes" in outputs:
        info["class_names"] = ["ground", *(f"digit {digit}" for digit in range(digits))]
    return StageOutput(outputs=outputs, info=info)


SPEC = StageSpec(
    name="ade20k_data",
    config=Ade20kDataConfig,
    entrypoint="stages.ade20k_data:run",
    preflight="stages.ade20k_data:preflight",
    resources=Resources(gpu=False, cpus_per_rank=16, hours=1.0),
)
