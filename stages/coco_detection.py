"""Detection and instance segmentation: Cascade Mask R-CNN on the pretrained ViT (released 1x).

Or Mask R-CNN, with which MGC is evaluated.
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from pydantic import NonNegativeInt

from mugs.transfer.detection.config import DetectionConfig
from pipeline.settings import Runtime
from pipeline.spec import Resources, StageConfig, StageSpec
from pipeline.stage import StageContext, StageOutput
from stages.shared.batch_checks import check_even_batch
from stages.shared.external_data import read_data_root
from stages.shared.frozen import (
    WEIGHTS,
    Pretrained,
    build_result_rows,
    describe_standard_errors,
    load_vit,
)

if TYPE_CHECKING:
    from mugs.data.dense.coco import CocoSplit

TABLE = "annotations_{split}.pt"


@dataclass(frozen=True, kw_only=True)
class CocoDetectionConfig(Pretrained, DetectionConfig):
    """ViT-S/16 as released by default; the bundled reproduction of ViT-B/16 has iBOT's settings."""

    activation_checkpointing: Runtime[bool] = True
    num_pictures: Runtime[NonNegativeInt] = 16

    def rate_follows_batch(self) -> bool:
        """Return that it does not: `lr` is for the released batch size."""
        return False

    def list_remarks(self, inputs: Mapping[str, StageConfig]) -> list[str]:
        """Remark on falls of the learning rate that the run ends before."""
        late = [epoch for epoch in self.decay_epochs if epoch >= self.epochs]
        if not late:
            return []
        return [
            f"the learning rate falls after epoch {' and '.join(map(str, late))} (decay_epochs), "
            f"which a run of {self.epochs} epochs does not reach"
        ]

    def list_facts(self, inputs: Mapping[str, StageConfig]) -> list[str]:
        """Say what the annotations of COCO take; those of small data sets take little."""
        if getattr(inputs.get("data"), "dataset", None) != "coco2017":
            return []
        return [
            "annotations: rank 0 alone parses them (3.4 GiB of memory while it does); "
            "then all ranks of a node share one table (0.5 GiB)"
        ]

    def check_resources(self, resources: Resources) -> None:
        """Require that the batch divides over the ranks, and each share into micro-batches."""
        check_even_batch(self.batch_size, resources)
        share = self.batch_size // resources.ranks
        # Images of a micro-batch are padded alike and their losses are averaged first, so its size
        # changes numbers and is never reduced to fit.
        if share % self.micro_batch_size:
            raise ValueError(
                f"batch_size {self.batch_size} leaves {share} images to a rank, "
                f"which are no whole passes of micro_batch_size {self.micro_batch_size}"
            )


def run(ctx: StageContext, cfg: CocoDetectionConfig) -> StageOutput:
    """Train and test; rows of box and mask AP.

    Outputs `detector`, its weights, `detections`, all of them, and `pictures` of the first images.
    """
    from mugs import distributed
    from mugs.transfer.detection.detector import build_detector
    from mugs.transfer.detection.evaluate import (
        compute_average_precision,
        detect_split,
        estimate_errors,
    )
    from mugs.transfer.detection.pictures import CAPTION, draw_pictures
    from mugs.transfer.detection.train import DetectionTraining
    from mugs.weights.backbone_file import write_backbone_file

    device = distributed.init_process_group()
    data = ctx.inputs["data"].info
    config = replace(cfg, detector=replace(cfg.detector, num_classes=data["num_classes"]))
    vit = load_vit(ctx, cfg.weights, drop_path=cfg.detector.drop_path).requires_grad_(True)
    vit.activation_checkpointing = cfg.activation_checkpointing
    model = build_detector(vit, config.detector, seed=cfg.seed)
    training = DetectionTraining(model, open_split(ctx, "train"), config, ctx.run_dir, device)
    training.train(ctx.control)
    val = open_split(ctx, "val")
    detections = detect_split(model, val, config, ctx.run_dir, device)
    info: dict[str, Any] = {"dataset": data["dataset"], "captions": {"pictures": CAPTION}}
    outputs = {"detector": ctx.run_dir / "weights" / "detector.safetensors"}
    rows = []
    # Only rank 0 gets the gathered detections.
    if detections is not None:
        write_backbone_file(
            outputs["detector"], model.state_dict(), {"classes": data["num_classes"]}
        )
        outputs["detections"] = detections
        pictures = ctx.run_dir / "pictures"
        if draw_pictures(val, detections, pictures, cfg.num_pictures):
            outputs["pictures"] = pictures
        setting = f"{cfg.epochs} epochs, lr={cfg.lr:g}, layer decay={cfg.layer_decay:g}"
        # Rows of the cascade have been written without its name.
        if cfg.detector.heads == "mask_rcnn":
            setting = f"mask_rcnn, {setting}"
        precision = compute_average_precision(val.annotations, detections)
        rows = build_result_rows(ctx, cfg.weights, setting, precision.items())
        info |= describe_standard_errors({setting: estimate_errors(val.annotations, detections)})
    distributed.barrier()
    if distributed.is_main():
        for split in ("train", "val"):
            (ctx.run_dir / TABLE.format(split=split)).unlink()
    return StageOutput(outputs=outputs, rows=rows, info=info)


def open_split(ctx: StageContext, split: str) -> "CocoSplit":
    """Return a split from where the data stage found it.

    Parsed annotations take gigabytes, so rank 0 alone parses them, and all ranks map its table.
    """
    from mugs import distributed
    from mugs.data.dense.coco import CocoSplit

    root = read_data_root(ctx)
    table = ctx.run_dir / TABLE.format(split=split)
    if distributed.is_main():
        CocoSplit(root, split).write_table(table)
    distributed.barrier()
    return CocoSplit(root, split, table=table)


SPEC = StageSpec(
    name="coco_detection",
    config=CocoDetectionConfig,
    entrypoint="stages.coco_detection:run",
    needs={"data": "coco_data", "weights": WEIGHTS},
    resources=Resources(ranks_per_node=8, hours=24.0),
)
