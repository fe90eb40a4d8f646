"""Settings of semantic segmentation."""

from dataclasses import dataclass, field
from typing import Annotated, Literal

from pydantic import Field, NonNegativeFloat, NonNegativeInt, PositiveFloat, PositiveInt

from pipeline.settings import Internal, Probability, Runtime, Settings

Variant = Literal["upernet", "linear"]


@dataclass(frozen=True, kw_only=True)
class SegmenterConfig(Settings):
    """Shape of the network around the ViT.

    upernet: UPerNet with an auxiliary head. linear:
    the frozen ViT's four maps side by side and one classifier.
    """

    # The head.
    variant: Variant = "upernet"
    num_classes: Internal[int] = 150
    # Of the UPerNet head: the ViT's width when None.
    channels: PositiveInt | None = None
    # Channels of the auxiliary head.
    auxiliary_channels: PositiveInt = 256
    # Weight of its loss.
    auxiliary_weight: NonNegativeFloat = 0.4
    # Of whole channels before the classifiers.
    dropout: Annotated[float, Field(ge=0, lt=1)] = 0.1


@dataclass(frozen=True, kw_only=True)
class SceneRecipe(Settings):
    """How images become crops and test inputs (mmsegmentation settings of iBOT and Mugs);
    sizes in pixels.
    """

    # An image is scaled to fit into both, portrait or landscape; in training both are first
    # multiplied by one draw from `ratio`.
    long_side: PositiveInt = 2048
    short_side: PositiveInt = 512
    # Factor of the size in training, drawn between these.
    ratio: tuple[float, float] = (0.5, 2.0)
    # Side of a training crop.
    crop: PositiveInt = 512
    # Of ten crops the first with at least two classes, each with less than this share, is taken,
    # else the eleventh.
    max_class_share: Annotated[float, Field(gt=0, le=1)] = 0.75
    # Of a horizontal flip.
    flip_prob: Probability = 0.5
    # For each of brightness, contrast, saturation and hue.
    photometric_prob: Probability = 0.5
    # Of the sliding test.
    window: PositiveInt = 512
    # Step of the window.
    stride: PositiveInt = 341


@dataclass(frozen=True, kw_only=True)
class SegmentationConfig(SegmenterConfig):
    """ViT-S/16 with UPerNet on ADE20K, as released; ViT-B/16 has the same settings.
    `batch_size` is global.
    """

    scenes: SceneRecipe = field(default_factory=SceneRecipe)
    # Optimizer steps of the whole training.
    steps: PositiveInt = 160_000
    batch_size: Annotated[int, Field(ge=2)] = 16
    # UPerNet has 3e-5. The linear variant has 3e-5 for ViT-S and 7e-4 for ViT-B (iBOT's
    # configuration).
    lr: PositiveFloat = 3e-5
    weight_decay: NonNegativeFloat = 0.05
    # 1 for the linear variant, whose ViT is not trained.
    layer_decay: Annotated[float, Field(gt=0, le=1)] = 0.9
    # Steps of the linear warm-up.
    warmup_steps: NonNegativeInt = 1500
    precision: Literal["fp32", "bf16"] = "bf16"
    seed: int = 0
    workers: Runtime[NonNegativeInt] = 8
    checkpoint_steps: Runtime[PositiveInt] = 1000
    log_steps: Runtime[PositiveInt] = 50
