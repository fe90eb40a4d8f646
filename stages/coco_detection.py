"""Detection and instance segmentation: Cascade Mask R-CNN on the pretrained ViT (released 1x schedule)."""

from typing import TYPE_CHECKING, Literal

from pydantic import Field, PositiveInt

from pipeline.spec import Resources, Runtime, StageConfig
from pipeline.stage import StageContext, StageOutput
from stages.shared.batch_checks import uneven
from stages.shared.external_data import read_root
from stages.shared.frozen import Pretrained, load_vit, result_row
from stages.shared.presets import same_named

if TYPE_CHECKING:
    from mugs.data.dense.coco import CocoSplit
    from mugs.transfer.detection.config import DetectionConfig


class DetectorOptions(StageConfig):
    """Fields and defaults of `mugs.transfer.detection.config.DetectorConfig`, whose docstring explains them."""

    image_size: tuple[int, int] = (800, 1008)
    drop_path: float = Field(0.1, ge=0, lt=1)
    width: int = Field(256, ge=1)
    fc_width: int = Field(1024, ge=1)
    head_convs: int = Field(4, ge=1)
    rpn_samples: int = Field(256, ge=1)
    roi_samples: int = Field(512, ge=1)
    proposals_train: int = Field(2000, ge=1)
    proposals_test: int = Field(1000, ge=1)
    max_detections: int = Field(100, ge=1)
    score_threshold: float = Field(0.05, ge=0, lt=1)


class ScaleOptions(StageConfig):
    """Fields and defaults of `mugs.transfer.detection.views.Scales`, whose docstring explains them."""

    short_sides: tuple[PositiveInt, ...] = Field(tuple(range(480, 801, 32)), min_length=1)
    max_side: int = Field(1333, ge=1)
    crop_short_sides: tuple[PositiveInt, ...] = Field((400, 500, 600), min_length=1)
    crop_sides: tuple[int, int] = (384, 600)
    crop_prob: float = Field(0.5, ge=0, le=1)
    flip_prob: float = Field(0.5, ge=0, le=1)
    test_short_side: int = Field(800, ge=1)


class CocoDetectionConfig(Pretrained):
    """ViT-S/16 as released by default; ViT-B/16 has the same settings (no release has other ones).

    `lr`: iBOT's configuration has 1e-4. `layer_decay`: iBOT sweeps 0.65, 0.75, 0.8 and 0.9. `images_per_pass`: images
    that are padded together and over which losses are averaged first, 4 on each of 8 GPUs in the release.
    """

    detector: DetectorOptions = DetectorOptions()
    scales: ScaleOptions = ScaleOptions()
    epochs: int = Field(12, ge=1)
    batch_size: int = Field(32, ge=1)
    images_per_pass: int = Field(4, ge=1)
    lr: float = Field(2e-4, gt=0)
    weight_decay: float = Field(0.05, ge=0)
    layer_decay: float = Field(0.8, gt=0, le=1)
    decay_epochs: tuple[int, ...] = (8, 11)
    warmup_steps: int = Field(500, ge=0)
    warmup_start: float = Field(0.001, ge=0, le=1)
    min_side: int = Field(32, ge=1)
    precision: Literal["fp32", "bf16"] = "bf16"
    seed: int = 0
    activation_checkpointing: bool = Runtime(True)
    threads: int = Runtime(4, ge=1)
    checkpoint_steps: int = Runtime(500, ge=1)
    log_steps: int = Runtime(50, ge=1)
    num_pictures: int = Runtime(16, ge=0)

    def misfit(self, resources: Resources) -> str | None:
        """A batch that does not divide over the ranks, or a rank's share over its passes."""
        share = self.batch_size // resources.ranks
        if self.batch_size % resources.ranks == 0 and share % self.images_per_pass:
            return (
                f"batch_size {self.batch_size} leaves {share} images to a rank, which are no whole passes of "
                f"images_per_pass {self.images_per_pass}"
            )
        return uneven(self.batch_size, resources)


def run(ctx: StageContext, cfg: CocoDetectionConfig) -> StageOutput:
    """Train and test; rows of box and mask AP, the detector's weights, all detections, pictures of the first images."""
    from mugs import distributed
    from mugs.transfer.detection.detector import build_detector
    from mugs.transfer.detection.evaluate import compute_average_precision, detect_split
    from mugs.transfer.detection.pictures import CAPTION, draw_pictures
    from mugs.transfer.detection.train import DetectionTraining
    from mugs.weights.backbone_file import write_backbone_file

    device = distributed.init_process_group()
    config = detection_config(cfg, ctx.inputs["data"].info["num_classes"])
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

    return CocoSplit(read_root(ctx), split)


def detection_config(cfg: CocoDetectionConfig, num_classes: int) -> "DetectionConfig":
    """The engine's configuration."""
    from mugs.transfer.detection.config import DetectionConfig, DetectorConfig
    from mugs.transfer.detection.views import Scales

    detector = DetectorConfig(num_classes=num_classes, **cfg.detector.model_dump())
    return same_named(
        DetectionConfig, cfg, detector=detector, scales=Scales(**cfg.scales.model_dump())
    )
