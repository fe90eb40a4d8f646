"""Check COCO in place: files, sizes, categories and outlines, before GPUs are spent on it."""

from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

from pydantic import PositiveInt

from pipeline.spec import Label, Resources, StageSpec
from pipeline.stage import StageContext, StageOutput
from stages.shared.external_data import ExternalDataConfig, Report, register_external_data


@dataclass(frozen=True, kw_only=True)
class CocoDataConfig(ExternalDataConfig):
    """A COCO data set; its name and counts are in the run id, its location is not.

    `data_dir` holds `train2017/`, `val2017/` and `annotations/instances_{train,val}2017.json`.
    The counts of coco2017 are known; those of others are checked if they are given.
    """

    kind: ClassVar[str] = "scenes"

    dataset: Label = "coco2017"
    num_classes: PositiveInt | None = None
    num_train_images: PositiveInt | None = None
    num_val_images: PositiveInt | None = None

    def check_files(self, root: Path, report: Report) -> dict[str, int]:
        """Read both splits; count images and categories."""
        from mugs.data.dense.coco import check_coco
        from mugs.data.sources.expected import ExpectedCounts

        images = {"train": self.num_train_images, "val": self.num_val_images}
        expected = ExpectedCounts(self.num_classes, images).or_known(self.dataset)
        splits = check_coco(root, expected, threads=self.threads, report=report)
        counts = {f"{name} images": len(split) for name, split in splits.items()}
        for name, split in splits.items():
            if split.num_uncounted:
                counts[f"annotations of {name} that do not count as objects"] = split.num_uncounted
        return {**counts, "categories": len(splits["train"].categories)}

    def write_builtin(self, root: Path) -> None:
        """Write scenes of digits with their outlines."""
        from mugs.data.mini.coco import materialize_coco

        materialize_coco(root, train=self.num_train_images or 200, val=self.num_val_images or 50)


def run(ctx: StageContext, cfg: CocoDataConfig) -> StageOutput:
    """Check both splits; output `layout` says where they are."""
    outputs, counts = register_external_data(ctx, cfg)
    # The detector takes its number of classes from here: the annotations decide, not a setting.
    return StageOutput(
        outputs=outputs, info={"dataset": cfg.dataset, "num_classes": counts["categories"]}
    )


SPEC = StageSpec(
    name="coco_data",
    config=CocoDataConfig,
    entrypoint="stages.coco_data:run",
    preflight="stages.shared.external_data:check_external_data",
    resources=Resources(gpu=False, cpus_per_rank=16, hours=1.0),
)
