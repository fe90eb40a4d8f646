"""Detection and instance segmentation: Cascade Mask R-CNN on the pretrained ViT (released 1x schedule)."""

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from pydantic import NonNegativeInt

from mugs.transfer.detection.config import DetectionConfig
from pipeline.settings import Runtime
from pipeline.spec import Resources, StageSpec
from pipeline.stage import StageContext, StageOutput
from stages.shared.batch_checks import explain_uneven_batch
from stages.shared.external_data import read_data_root
from stages.shared.frozen import WEIGHTS, Pretrained, load_vit, result_row

if TYPE_CHECKING:
    from mugs.data.dense.coco import CocoSplit


@dataclass(frozen=True, kw_only=True)
class CocoDetectionConfig(Pretrained, DetectionConfig):
    """ViT-S/16 as released by default; ViT-B/16 has the same settings (no release has other ones)."""

    activation_checkpointing: Runtime[bool] = True
    num_pictures: Runtime[NonNegativeInt] = 16

    def misfit(self, resources: Resources) -> str | None:
        """A batch that does not divide over the ranks, or a rank's share over its passes."""
        share = self.batch_size // resources.ranks
        if self.batch_size % resources.ranks == 0 and share % self.micro_batch_size:
            return (
                f"batch_size {self.batch_size} leaves {share} images to a rank, which are no whole passes of "
                f"micro_batch_size {self.micro_batch_size}"
            )
        return explain_uneven_batch(self.batch_size, resources)


def run(ctx: StageContext, cfg: CocoDetectionConfig) -> StageOutput:
    """Train and test; rows of box and mask AP, the detector's weights, all detections, pictures of the first images."""
    from mugs import distributed
    from mugs.transfer.detection.detector import build_detector
    from mugs.transfer.detection.evaluate import compute_average_precision, detect_split
    from mugs.transfer.detection.pictures import CAPTION, draw_pictures
    from mugs.transfer.detection.train import DetectionTraining
    from mugs.weights.backbone_file import write_backbone_file

    device = distributed.init_process_group()
    num_classes = ctx.inputs["data"].info["num_classes"]
    config = replace(cfg, detector=replace(cfg.detector, num_classes=num_classes))
    vit = load_vit(ctx, cfg.weights, drop_path=cfg.detector.drop_path).requires_grad_(True)
    vit.activation_checkpointing = cfg.activation_checkpointing
    model = build_detector(vit, config.detector, seed=cfg.seed)
    DetectionTraining(model, open_split(ctx, "train"), config, ctx.run_dir, device).train(
        ctx.control
    )
    val = open_split(ctx, "val")
    detections = detect_split(model, val, config, ctx.run_dir, device)
    outputs = {"detector": ctx.run_dir / "weights" / "detector.safetensors"}
    rows = []
    if detections is not None:
        write_backbone_file(
            outputs["detector"], model.state_dict(), {"classes": config.detector.num_classes}
        )
        outputs["detections"] = detections
        if draw_pictures(val, detections, ctx.run_dir / "pictures", cfg.num_pictures):
            outputs["pictures"] = ctx.run_dir / "pictures"
        setting = f"{cfg.epochs} epochs, lr={cfg.lr:g}, layer decay={cfg.layer_decay:g}"
        rows = [
            result_row(ctx, cfg.weights, setting=setting, metric=metric, value=value)
            for metric, value in compute_average_precision(val.annotations, detections).items()
        ]
    distributed.barrier()
    info = {"dataset": ctx.inputs["data"].info["dataset"], "captions": {"pictures": CAPTION}}
    return StageOutput(outputs=outputs, rows=rows, info=info)


def open_split(ctx: StageContext, split: str) -> "CocoSplit":
    """A split where the check found it."""
    from mugs.data.dense.coco import CocoSplit

    return CocoSplit(read_data_root(ctx), split)


SPEC = StageSpec(
    name="coco_detection",
    config=CocoDetectionConfig,
    entrypoint="stages.coco_detection:run",
    needs={"data": "coco_data", "weights": WEIGHTS},
    resources=Resources(ranks_per_node=8, hours=24.0),
)
