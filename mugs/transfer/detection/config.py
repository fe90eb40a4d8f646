"""Sizes and counts of the detector."""

from dataclasses import dataclass


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
