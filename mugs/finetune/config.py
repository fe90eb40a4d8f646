"""Settings of a fine-tuning run."""

from dataclasses import dataclass, field
from typing import Annotated, Literal

from pydantic import Field, NonNegativeFloat, NonNegativeInt, PositiveFloat, PositiveInt

from mugs.data.views.config import Shares
from pipeline.settings import Added, FormerName, Probability, Runtime, Settings

_RANDAUGMENT = r"^(rand(-(m\d+|n\d+|p[\d.]+|mstd[\d.]+|mmax\d+|inc[01]))*)?$"


@dataclass(frozen=True, kw_only=True)
class ImageOptions(Settings):
    """timm's training transform and the evaluation crop.

    Sizes are in pixels, scales are shares of the image area.
    """

    # Side of the training and validation crops.
    size: PositiveInt = 224
    # Share of the image area that a training crop covers, drawn between these.
    scale: Shares = (0.08, 1.0)
    # Probability of a horizontal flip.
    flip_prob: Probability = 0.5
    # RandAugment policy by timm's name, "" for none.
    randaugment: Annotated[str, Field(pattern=_RANDAUGMENT)] = "rand-m9-mstd0.5-inc1"
    # Probability of one box of N(0, 1) noise, drawn after normalizing.
    erase_prob: Probability = 0.25
    # Shorter side to which validation images are resized before the crop.
    resize: PositiveInt = 256
    # Interpolation of that resize.
    eval_interpolation: Literal["bicubic", "bilinear"] = "bicubic"

    def __post_init__(self) -> None:
        """Refuse validation images that do not fill their crop."""
        if self.size > self.resize:
            raise ValueError(
                f"validation images with a shorter side of {self.resize} pixels (resize) do not "
                f"fill a crop of {self.size} (size): the border would be black; set resize too"
            )


@dataclass(frozen=True, kw_only=True)
class MixOptions(Settings):
    """Mixup and cutmix, each with Beta(alpha, alpha); an alpha of 0 turns it off."""

    # Alpha of mixup.
    mixup: NonNegativeFloat = 0.8
    # Alpha of cutmix.
    cutmix: NonNegativeFloat = 1.0
    # Probability that a batch or group is mixed at all.
    prob: Probability = 1.0
    # Probability of cutmix instead of mixup, if both are on.
    switch_prob: Probability = 0.5
    # Label smoothing.
    smoothing: Annotated[float, Field(ge=0, lt=1)] = 0.1
    # Number of images that share one draw, as those of one GPU do in the released runs; None for
    # the whole batch.
    group: Annotated[int, Field(ge=2, multiple_of=2)] | None = None
    # Whose boxes cutmix cuts: a box of odd sides is one pixel narrower and lower in timm 0.4.5,
    # which the release used ("released"), than in timm 1.0.31 and later (E27).
    cutmix_box: Literal["released", "timm"] = "released"

    def __post_init__(self) -> None:
        """Refuse a kind of box where none is cut."""
        if self.cutmix_box != "released" and not self.cuts:
            raise ValueError("cutmix_box has no effect without cutmix; remove it")

    @property
    def on(self) -> bool:
        """Whether images are mixed at all."""
        return self.prob > 0 and (self.mixup > 0 or self.cutmix > 0)

    @property
    def cuts(self) -> bool:
        """Whether boxes are ever cut."""
        return self.on and self.cutmix > 0 and (self.mixup == 0 or self.switch_prob > 0)

    def unused_settings(self) -> frozenset[str]:
        """Leave out the kind of box where none is cut: such runs are older than the setting."""
        return frozenset() if self.cuts else frozenset({"cutmix_box"})


@dataclass(frozen=True, kw_only=True)
class RateOptions(Settings):
    """Learning rate: the peak is base_lr, times batch_size / lr_batch where that is given.

    unit "step": linear from warmup_lr to the peak over warmup_epochs, end point included, then
    cosine to min_lr, a value per step. unit "epoch": timm's cosine, a value per epoch, which counts
    the warm-up as part of the cosine.
    """

    # Peak learning rate, for a batch of `lr_batch` if that is given.
    base_lr: PositiveFloat
    # Batch size that `base_lr` is meant for; None if the rate does not depend on the batch size.
    lr_batch: PositiveInt | None = None
    # Whether the rate changes every step or every epoch.
    unit: Literal["step", "epoch"] = "step"
    # Number of epochs of the linear warm-up.
    warmup_epochs: NonNegativeInt = 5
    # Learning rate at the start of the warm-up.
    warmup_lr: NonNegativeFloat = 0.0
    # Learning rate at the end. May exceed the peak, as in some released runs: the rate then rises
    # (E11).
    min_lr: NonNegativeFloat = 1e-6
    # With unit "epoch": each epoch uses the value of the epoch before it, as released (E12).
    epoch_lag: bool = True


@dataclass(frozen=True, kw_only=True)
class HeadOptions(Settings):
    """Classifier on the class token: one linear layer, or two with GELU between them.

    Weights are drawn from N(0, 0.02) truncated at +-2, those of the last layer times `scale`;
    biases are 0.
    """

    # "linear" has one layer, "mlp" has two.
    kind: Literal["linear", "mlp"] = "linear"
    # Width of the hidden layer of "mlp".
    hidden: PositiveInt = 2048
    # Factor of the initial weights of the last layer.
    scale: PositiveFloat = 1.0
    # Initial weights of the first layer of "mlp": "random" as released, whose loader misses the
    # names (E8); "pretrained" takes the first layer of the pretraining's group head, as iBOT's
    # protocol does with its only head.
    init: Literal["random", "pretrained"] = "random"

    def __post_init__(self) -> None:
        """Refuse a pretrained layer where there is none."""
        if self.init == "pretrained" and self.kind == "linear":
            raise ValueError("init pretrained needs kind mlp: a linear head has no first layer")


@dataclass(frozen=True, kw_only=True)
class FinetuneConfig(Settings):
    """A training of backbone and head. `batch_size` is global."""

    epochs: PositiveInt
    batch_size: PositiveInt
    rate: RateOptions
    images: ImageOptions = field(default_factory=ImageOptions)
    mix: MixOptions = field(default_factory=MixOptions)
    head: HeadOptions = field(default_factory=HeadOptions)
    weight_decay: NonNegativeFloat = 0.05
    # Class token and position table have weight decay too: as released with few labels and in
    # transfer, but not on ImageNet with all labels (E23).
    decay_tokens: Added[bool] = False
    # The learning rate of a layer is this factor times that of the layer after it.
    layer_decay: Annotated[float, Field(gt=0, le=1)] = 1.0
    # Repeated augmentation: 3 draws three views of each image per epoch and uses a third of the
    # images.
    repeats: PositiveInt = 1
    # Validate after every `validate_epochs`-th epoch and after the last one.
    validate_epochs: PositiveInt = 1
    precision: Literal["fp32", "bf16"] = "fp32"
    seed: int = 0
    micro_batch_size: Annotated[Runtime[PositiveInt | None], FormerName("max_images_per_step")] = (
        None
    )
    workers: Runtime[NonNegativeInt] = 2
    checkpoint_steps: Runtime[PositiveInt] = 500
    log_steps: Runtime[PositiveInt] = 10

    @property
    def peak_lr(self) -> float:
        """Return the peak learning rate before layer decay."""
        if self.rate.lr_batch is None:
            return self.rate.base_lr
        return self.rate.base_lr * self.batch_size / self.rate.lr_batch
