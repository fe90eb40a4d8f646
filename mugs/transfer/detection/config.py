"""Sizes and counts of the detector."""

from dataclasses import dataclass, field
from typing import Literal

from mugs.transfer.detection.views import Scales


@dataclass(frozen=True, kw_only=True)
class DetectorConfig:
    """Cascade Mask R-CNN as iBOT and Mugs run it; its thresholds and loss weights stand where they are used.

    width: channels of the FPN, the RPN and the heads. rpn_samples, roi_samples: boxes per image that losses are taken
    on. proposals_*: kept per level and per image. image_size: (rows, columns) of pixels of the position table.
    """

    num_classes: int = 80
    image_size: tuple[int, int] = (800, 1008)
    drop_path: float = 0.1
    width: int = 256
    fc_width: int = 1024
    head_convs: int = 4
    rpn_samples: int = 256
    roi_samples: int = 512
    proposals_train: int = 2000
    proposals_test: int = 1000
    max_detections: int = 100
    score_threshold: float = 0.05


@dataclass(frozen=True, kw_only=True)
class DetectionConfig:
    """The 1x schedule on COCO by default. `batch_size` is global; the last three fields cannot change a number.

    images_per_pass: images padded and sent through together, and over which losses are averaged first. decay_epochs:
    after how many epochs the rate falls to a tenth. min_side: smaller images are not trained on.
    """

    detector: DetectorConfig = field(default_factory=DetectorConfig)
    scales: Scales = field(default_factory=Scales)
    epochs: int = 12
    batch_size: int = 32
    images_per_pass: int = 4
    lr: float = 2e-4
    weight_decay: float = 0.05
    layer_decay: float = 0.8
    decay_epochs: tuple[int, ...] = (8, 11)
    warmup_steps: int = 500
    warmup_start: float = 0.001
    min_side: int = 32
    precision: Literal["fp32", "bf16"] = "bf16"
    seed: int = 0
    threads: int = 4
    checkpoint_steps: int = 500
    log_steps: int = 50
