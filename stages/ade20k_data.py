"""Check ADE20K or PASCAL VOC in place: all their files, before GPUs are spent on them."""

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal

from pydantic import Field, PositiveInt

from pipeline.settings import Added
from pipeline.spec import Label, Resources, StageSpec
from pipeline.stage import StageContext, StageOutput
from stages.shared.external_data import ExternalDataConfig, Report, register_external_data


@dataclass(frozen=True, kw_only=True)
class Ade20kDataConfig(ExternalDataConfig):
    """A data set of scenes; its name and counts are in the run id, its location is not.

    `data_dir` holds `images/` and `annotations/`, each with `training/` and `validation/`; in the
    layout of PASCAL VOC, it holds `JPEGImages/`, `SegmentationClass/` and `ImageSets/`. The
    built-in scenes have a background and `num_classes` - 1 digits.
    """

    kind: ClassVar[str] = "scenes"

    dataset: Label = "ade20k"
    # Number of classes; annotations are 8-bit and keep a value for void.
    num_classes: Annotated[int, Field(ge=2, le=254)] = 150
    num_train_images: PositiveInt = 20210
    num_val_images: PositiveInt = 2000
    # 0 in an annotation is void, and class 0 is written as 1.
    reduce_zero: bool = True
    # Where the files are: as in ADE20K, or as in VOCdevkit/VOC2012.
    layout: Added[Literal["ade20k", "voc"]] = "ade20k"

    def __post_init__(self) -> None:
        """Refuse to take the background of PASCAL VOC as void."""
        if self.layout == "voc" and self.reduce_zero:
            raise ValueError(
                "reduce_zero: in the maps of PASCAL VOC 0 is a class, the background; set it to "
                "false"
            )

    def check_files(self, root: Path, report: Report) -> dict[str, int]:
        """Read all scenes and count them."""
        from mugs.data.dense.ade20k import check_scenes

        counts = {"train": self.num_train_images, "val": self.num_val_images}
        check_scenes(
            root,
            counts,
            num_classes=self.num_classes,
            reduce_zero=self.reduce_zero,
            layout=self.layout,
            threads=self.threads,
            report=report,
        )
        return {f"{split} images": count for split, count in counts.items()}

    def write_builtin(self, root: Path) -> None:
        """Write scenes of digits on a background."""
        from mugs.data.mini.scenes_and_videos import materialize_scenes

        materialize_scenes(
            root,
            train=self.num_train_images,
            val=self.num_val_images,
            classes=self.num_classes - 1,
        )


def run(ctx: StageContext, cfg: Ade20kDataConfig) -> StageOutput:
    """Check both splits; output `layout` says where they are."""
    outputs, _ = register_external_data(ctx, cfg)
    info: dict[str, Any] = {
        "dataset": cfg.dataset,
        "num_classes": cfg.num_classes,
        "reduce_zero": cfg.reduce_zero,
        "layout": cfg.layout,
    }
    if "scenes" in outputs:
        # Names for the legend of the pictures; ADE20K's own 150 would not fit there.
        info["class_names"] = ["ground", *(f"digit {n}" for n in range(cfg.num_classes - 1))]
    return StageOutput(outputs=outputs, info=info)


SPEC = StageSpec(
    name="ade20k_data",
    config=Ade20kDataConfig,
    entrypoint="stages.ade20k_data:run",
    preflight="stages.shared.external_data:check_external_data",
    resources=Resources(gpu=False, cpus_per_rank=16, hours=1.0),
)
