"""Settings of semantic segmentation."""

from dataclasses import dataclass, field
from typing import Annotated, Literal

from pydantic import Field, NonNegativeFloat, NonNegativeInt, PositiveFloat, PositiveInt

from pipeline.settings import Added, Internal, Probability, Runtime, Settings

Variant = Literal["upernet", "linear", "semantic_fpn"]


@dataclass(frozen=True, kw_only=True)
class SegmenterConfig(Settings):
    """Shape of the network around the ViT.

    upernet: UPerNet with an auxiliary head. linear: the four maps of the frozen ViT, concatenated,
    and one classifier, without norm and dropout. semantic_fpn: an FPN, whose maps are summed
    (MGC's evaluation).
    """

    # Which of the three networks.
    variant: Variant = "upernet"
    num_classes: Internal[int] = 150
    # Channels of the head; null for the width of the ViT in UPerNet, and for 128 in Semantic FPN,
    # whose FPN has twice as many.
    channels: PositiveInt | None = None
    # Zero-based blocks of twelve whose outputs are used; in proportion if there are not twelve.
    taps: Added[Literal["3-5-7-11", "2-5-8-11"]] = "3-5-7-11"
    # Channels of the auxiliary head.
    auxiliary_channels: PositiveInt = 256
    # Weight of the loss of the auxiliary head.
    auxiliary_weight: NonNegativeFloat = 0.4
    # Dropout rate of whole channels before the classifiers of UPerNet and Semantic FPN.
    dropout: Annotated[float, Field(ge=0, lt=1)] = 0.1


@dataclass(frozen=True, kw_only=True)
class SceneRecipe(Settings):
    """How images become crops and test inputs (mmsegmentation settings of iBOT and Mugs).

    Sizes are in pixels.
    """

    # An image is scaled to fit into both, portrait or landscape. In training, both are first
    # multiplied by one draw from `ratio`.
    long_side: PositiveInt = 2048
    short_side: PositiveInt = 512
    # Range of the factor of the size in training.
    ratio: tuple[float, float] = (0.5, 2.0)
    # Side of a training crop.
    crop: PositiveInt = 512
    # A crop is accepted if it has at least two classes, each with less than this share. After ten
    # rejected crops, the eleventh is taken.
    max_class_share: Annotated[float, Field(gt=0, le=1)] = 0.75
    # Probability of a horizontal flip.
    flip_prob: Probability = 0.5
    # Probability of a change, for each of brightness, contrast, saturation and hue.
    photometric_prob: Probability = 0.5
    # "slide": a test image is taken by windows. "whole": all at once (MGC).
    test: Added[Literal["slide", "whole"]] = "slide"
    # Side of the sliding window of the test.
    window: PositiveInt = 512
    # Step of the sliding window.
    stride: PositiveInt = 341

    def __post_init__(self) -> None:
        """Refuse settings of windows where there are none."""
        for name in sorted(self.unused_settings()):
            if getattr(self, name) != getattr(type(self), name):
                raise ValueError(f"{name}: test is whole, which has no windows; leave it out")
        if self.stride > self.window:
            raise ValueError(
                f"stride {self.stride} is more than window {self.window}: pixels between the "
                "windows would have no class"
            )
        if not 0 < self.ratio[0] <= self.ratio[1]:
            raise ValueError(f"ratio {self.ratio}: expected the smaller factor first, above 0")

    def unused_settings(self) -> frozenset[str]:
        """Return the settings of the windows if there are none."""
        return frozenset({"window", "stride"} if self.test == "whole" else ())


@dataclass(frozen=True, kw_only=True)
class SegmentationConfig(SegmenterConfig):
    """ViT-S/16 with UPerNet on ADE20K, as released.

    `batch_size` is global.
    """

    scenes: SceneRecipe = field(default_factory=SceneRecipe)
    # Number of optimizer steps of the whole training.
    steps: PositiveInt = 160_000
    batch_size: Annotated[int, Field(ge=2)] = 16
    # Peak learning rate. UPerNet has 3e-5. The linear variant has 3e-5 for ViT-S and 7e-4 for ViT-B
    # (iBOT's configuration).
    lr: PositiveFloat = 3e-5
    weight_decay: NonNegativeFloat = 0.05
    # Parameters with weight decay. "matrices": those with more than one dimension; the linear
    # variant decays its bias too. "all_but_norms": all but norms, class token and positions (MGC).
    decay: Added[Literal["matrices", "all_but_norms"]] = "matrices"
    # 1 for the linear variant, whose ViT is not trained.
    layer_decay: Annotated[float, Field(gt=0, le=1)] = 0.9
    # Number of steps of the linear warm-up.
    warmup_steps: NonNegativeInt = 1500
    precision: Literal["fp32", "bf16"] = "bf16"
    # Precision of the test, whatever the training had.
    test_precision: Literal["fp32", "bf16"] = "fp32"
    seed: int = 0
    workers: Runtime[NonNegativeInt] = 8
    checkpoint_steps: Runtime[PositiveInt] = 1000
    log_steps: Runtime[PositiveInt] = 50
