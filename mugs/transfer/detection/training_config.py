"""Settings of a detection run around the detector."""

from dataclasses import dataclass, field
from typing import Literal

from mugs.transfer.detection.config import DetectorConfig
from mugs.transfer.detection.views import Scales


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


@dataclass(frozen=True, kw_only=True)
class StepSchedule:
    """Constant rate with a tenth after each of `decay_epochs`, times a linear warm-up; constant weight decay."""

    peak_lr: float
    steps_per_epoch: int
    epochs: int
    weight_decay: float
    decay_epochs: tuple[int, ...]
    warmup_steps: int
    warmup_start: float

    @property
    def total_steps(self) -> int:
        """Optimizer steps of the run."""
        return self.steps_per_epoch * self.epochs

    def lr(self, step: int) -> float:
        """Learning rate of a step."""
        rate: float = self.peak_lr * 0.1 ** sum(step // self.steps_per_epoch >= epoch for epoch in self.decay_epochs)
        if step >= self.warmup_steps:
            return rate
        return rate * (1 - (1 - step / self.warmup_steps) * (1 - self.warmup_start))

    def wd(self, step: int) -> float:
        """Weight decay of a step."""
        return self.weight_decay

    def rates(self, step: int) -> dict[str, float]:
        """What the log notes."""
        return {"lr": self.lr(step)}


def build_schedule(config: DetectionConfig, steps_per_epoch: int) -> StepSchedule:
    """The schedule of a run."""
    return StepSchedule(
        peak_lr=config.lr,
        steps_per_epoch=steps_per_epoch,
        epochs=config.epochs,
        weight_decay=config.weight_decay,
        decay_epochs=config.decay_epochs,
        warmup_steps=config.warmup_steps,
        warmup_start=config.warmup_start,
    )
