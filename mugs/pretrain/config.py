"""Settings of a pretraining run around the method."""

from collections.abc import Mapping
from dataclasses import dataclass, field

from mugs.data.loading.batch import LoaderName, RendererName
from mugs.data.views.config import ViewRecipe
from mugs.pretrain.step import StepConfig


@dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """The run around the method. `batch_size` is global; the fields after `views` cannot change a number.

    keep_checkpoints: that many newest ones stay; those after every `keep_every_epochs` epochs stay too (0: none).
    checkpoint_retry_minutes: for so long a full or stumbling disk is tried again before the run fails.
    calibration: epoch -> name of a loss (or "total") -> its mean in a known run, to compare with.
    """

    epochs: int
    batch_size: int
    base_lr: float
    min_lr: float = 1e-6
    warmup_epochs: int = 10
    weight_decay: tuple[float, float] = (0.04, 0.2)
    teacher_momentum: float = 0.996
    patch_lr_scale: float = 0.2
    steps_per_epoch: int | None = None
    seed: int = 0
    step: StepConfig = field(default_factory=StepConfig)
    views: ViewRecipe = field(default_factory=ViewRecipe)
    max_images_per_step: int | None = None
    loader: LoaderName = "auto"
    renderer: RendererName = "fast"
    threads: int = 2
    checkpoint_steps: int = 500
    keep_checkpoints: int = 2
    keep_every_epochs: int = 0
    checkpoint_retry_minutes: float = 10.0
    log_steps: int = 10
    profile_steps: int = 0
    calibration: Mapping[int, Mapping[str, float]] = field(default_factory=dict)

    @property
    def peak_lr(self) -> float:
        """base_lr * batch_size / 256."""
        return self.base_lr * self.batch_size / 256
