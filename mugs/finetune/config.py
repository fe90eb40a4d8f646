"""Settings of a fine-tuning run."""

from dataclasses import dataclass, field
from typing import Literal


@dataclass(frozen=True, kw_only=True)
class ImageOptions:
    """timm's training transform and the evaluation crop; sizes in pixels, scales as shares of the image area.

    randaugment: timm's name of a policy, "" for none. erase_prob: of one box of N(0, 1) noise, after normalising.
    """

    size: int = 224
    scale: tuple[float, float] = (0.08, 1.0)
    flip_prob: float = 0.5
    randaugment: str = "rand-m9-mstd0.5-inc1"
    erase_prob: float = 0.25
    resize: int = 256
    eval_interpolation: Literal["bicubic", "bilinear"] = "bicubic"


@dataclass(frozen=True, kw_only=True)
class MixOptions:
    """Mixup and cutmix with Beta(alpha, alpha), 0 for off; `switch_prob` is that of cutmix where both are on.

    group: images that share one draw, as those of one GPU do in the released runs; None for the whole batch.
    """

    mixup: float = 0.8
    cutmix: float = 1.0
    prob: float = 1.0
    switch_prob: float = 0.5
    smoothing: float = 0.1
    group: int | None = None

    @property
    def on(self) -> bool:
        """Whether images are mixed at all."""
        return self.prob > 0 and (self.mixup > 0 or self.cutmix > 0)


@dataclass(frozen=True, kw_only=True)
class RateOptions:
    """Learning rate: peak = base_lr, times batch_size / lr_batch where that is given.

    unit "step": from warmup_lr to the peak over warmup_epochs, end point included, then cosine to min_lr, per step.
    unit "epoch": timm's cosine, one value per epoch, which counts the warm-up as part of the cosine; with epoch_lag the
    first epoch's value serves for the second too, and so on (released). min_lr may exceed the peak, as in some released
    runs: the rate then rises.
    """

    base_lr: float
    lr_batch: int | None = None
    unit: Literal["step", "epoch"] = "step"
    warmup_epochs: int = 5
    warmup_lr: float = 0.0
    min_lr: float = 1e-6
    epoch_lag: bool = True


@dataclass(frozen=True, kw_only=True)
class HeadOptions:
    """Classifier on the class token: one linear layer, or two with GELU between them.

    Weights N(0, 0.02) cut at +-2, those of the last layer times `scale`; biases 0.
    """

    kind: Literal["linear", "mlp"] = "linear"
    hidden: int = 2048
    scale: float = 1.0


@dataclass(frozen=True, kw_only=True)
class FinetuneConfig:
    """A run. `batch_size` is global; the last four fields cannot change a number.

    layer_decay: the rate of a layer is this times that of the layer after it. repeats: 3 draws three views of each
    image per epoch and uses as many images fewer (repeated augmentation). Validation follows every
    `validate_epochs`-th epoch and the last.
    """

    epochs: int
    batch_size: int
    rate: RateOptions
    images: ImageOptions = field(default_factory=ImageOptions)
    mix: MixOptions = field(default_factory=MixOptions)
    head: HeadOptions = field(default_factory=HeadOptions)
    weight_decay: float = 0.05
    layer_decay: float = 1.0
    repeats: int = 1
    validate_epochs: int = 1
    precision: str = "fp32"
    seed: int = 0
    max_images_per_step: int | None = None
    workers: int = 2
    checkpoint_steps: int = 500
    log_steps: int = 10

    @property
    def peak_lr(self) -> float:
        """The learning rate's peak before layer decay."""
        rate = self.rate
        return (
            rate.base_lr
            if rate.lr_batch is None
            else rate.base_lr * self.batch_size / rate.lr_batch
        )
