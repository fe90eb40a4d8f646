"""Settings of detection and instance segmentation."""

from dataclasses import dataclass, field
from typing import Annotated, Literal

from pydantic import Field, NonNegativeInt, PositiveFloat, PositiveInt

from pipeline.settings import Added, FormerName, Internal, Probability, Runtime, Settings


@dataclass(frozen=True, kw_only=True)
class DetectorConfig(Settings):
    """Cascade Mask R-CNN as iBOT and Mugs run it, or the Mask R-CNN of MGC.

    Thresholds and loss weights are constants beside the code that uses them.
    """

    num_classes: Internal[int] = 80
    # "cascade": three stages of heads (Cascade Mask R-CNN). "mask_rcnn": one, as mmdetection's base
    # configuration of Mask R-CNN has it: two fully connected layers in place of convolutions and
    # one, L1 losses of boxes, and anchors that cross the border of the image are trained too.
    heads: Added[Literal["cascade", "mask_rcnn"]] = "cascade"
    # Whether the final LayerNorm is applied to the four outputs of the ViT (MGC).
    normed: Added[bool] = False
    # (rows, columns) of pixels that the position table covers.
    image_size: tuple[int, int] = (800, 1008)
    drop_path: Annotated[float, Field(ge=0, lt=1)] = 0.1
    # Channels of the FPN, the RPN and the heads.
    width: PositiveInt = 256
    # Width of the fully connected layer of the box heads.
    fc_width: PositiveInt = 1024
    # Convolutions of each box head and mask head.
    head_convs: PositiveInt = 4
    # Number of boxes per image that the losses are computed on.
    rpn_samples: PositiveInt = 256
    roi_samples: PositiveInt = 512
    # Number of proposals kept per level and per image.
    proposals_train: PositiveInt = 2000
    proposals_test: PositiveInt = 1000
    # Number of proposals kept per image in training; null for as many as per level.
    proposals_train_image: Added[PositiveInt | None] = None
    # Number of detections kept per test image.
    max_detections: PositiveInt = 100
    # Detections with a lower score are dropped.
    score_threshold: Annotated[float, Field(ge=0, lt=1)] = 0.05


@dataclass(frozen=True, kw_only=True)
class Scales(Settings):
    """Sizes in pixels, as in DETR's and iBOT's training.

    Each image is flipped or not; then its shorter side becomes one of `short_sides`. With
    probability `crop_prob`, two steps come before that resize: the shorter side becomes one of
    `crop_short_sides`, and a crop is taken whose height and width are drawn independently from
    `crop_sides`. The longer side is at most `max_side`.
    """

    # Lengths of the shorter side in training.
    short_sides: Annotated[tuple[PositiveInt, ...], Field(min_length=1)] = tuple(
        range(480, 801, 32)
    )
    # Maximum length of the longer side.
    max_side: PositiveInt = 1333
    # Lengths of the shorter side before a crop.
    crop_short_sides: Annotated[tuple[PositiveInt, ...], Field(min_length=1)] = (400, 500, 600)
    # Shortest and longest side of a crop.
    crop_sides: tuple[int, int] = (384, 600)
    # Probability of a crop.
    crop_prob: Probability = 0.5
    # Probability of a horizontal flip.
    flip_prob: Probability = 0.5
    # Length of the shorter side in tests.
    test_short_side: PositiveInt = 800

    def __post_init__(self) -> None:
        """Refuse sides of crops in reverse."""
        if not 0 < self.crop_sides[0] <= self.crop_sides[1]:
            raise ValueError(f"crop_sides {self.crop_sides}: expected the shorter side first")


@dataclass(frozen=True, kw_only=True)
class DetectionConfig(Settings):
    """The 1x schedule on COCO. `batch_size` is global."""

    detector: DetectorConfig = field(default_factory=DetectorConfig)
    scales: Scales = field(default_factory=Scales)
    epochs: PositiveInt = 12
    batch_size: PositiveInt = 32
    # Number of images that are padded and sent through together. Losses are averaged over them
    # first, so this changes numbers. The release has 4 on each of 8 GPUs.
    micro_batch_size: Annotated[PositiveInt, FormerName("images_per_pass")] = 4
    # Peak learning rate. iBOT's configuration has 1e-4.
    lr: PositiveFloat = 2e-4
    weight_decay: Annotated[float, Field(ge=0)] = 0.05
    # Parameters with weight decay. "matrices": those with more than one dimension. "all_but_norms":
    # all but norms, class token and positions (MGC).
    decay: Added[Literal["matrices", "all_but_norms"]] = "matrices"
    # iBOT sweeps 0.65, 0.75, 0.8 and 0.9.
    layer_decay: Annotated[float, Field(gt=0, le=1)] = 0.8
    # The learning rate falls to a tenth after each of these numbers of epochs.
    decay_epochs: tuple[int, ...] = (8, 11)
    # Number of steps of the linear warm-up.
    warmup_steps: NonNegativeInt = 500
    # Factor of the learning rate at the start of the warm-up.
    warmup_start: Probability = 0.001
    # Images with a shorter side below this are not trained on, in pixels.
    min_side: PositiveInt = 32
    precision: Literal["fp32", "bf16"] = "bf16"
    # Precision of the test, whatever the training had.
    test_precision: Literal["fp32", "bf16"] = "fp32"
    seed: int = 0
    threads: Runtime[PositiveInt] = 4
    checkpoint_steps: Runtime[PositiveInt] = 500
    log_steps: Runtime[PositiveInt] = 50
