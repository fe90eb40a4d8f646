"""Learning rate schedules of the dense tasks, per iteration, as mmcv computes them."""

from abc import ABC, abstractmethod
from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class WarmupSchedule(ABC):
    """A decaying rate, times a linear warm-up from `warmup_start`; constant weight decay."""

    peak_lr: float
    weight_decay: float
    warmup_steps: int
    warmup_start: float

    @abstractmethod
    def decay(self, step: int) -> float:
        """Return the share of the peak at a step, without the warm-up."""

    def lr(self, step: int) -> float:
        """Return the learning rate of a step."""
        # The two factors overlap: mmcv's rate decays during the warm-up too.
        return self.peak_lr * self.decay(step) * self.warmup(step)

    def warmup(self, step: int) -> float:
        """Return the factor of a step, from `warmup_start` to 1."""
        if step >= self.warmup_steps:
            return 1.0
        return 1 - (1 - step / self.warmup_steps) * (1 - self.warmup_start)

    def wd(self, step: int) -> float:
        """Return the weight decay of a step."""
        return self.weight_decay

    def rates(self, step: int) -> dict[str, float]:
        """Return what the log records."""
        return {"lr": self.lr(step)}


@dataclass(frozen=True, kw_only=True)
class PolySchedule(WarmupSchedule):
    """Segmentation: linear decay to zero (mmcv's poly schedule with power 1)."""

    total_steps: int
    warmup_start: float = 1e-6

    def decay(self, step: int) -> float:
        """Return 1 at the first step, 0 after the last."""
        return 1 - step / self.total_steps


@dataclass(frozen=True, kw_only=True)
class StepSchedule(WarmupSchedule):
    """Detection: the rate falls to a tenth after each of `decay_epochs`."""

    steps_per_epoch: int
    epochs: int
    decay_epochs: tuple[int, ...]

    @property
    def total_steps(self) -> int:
        """Optimizer steps of the run."""
        return self.steps_per_epoch * self.epochs

    def decay(self, step: int) -> float:
        """Return 0.1 to the power of the decay epochs that are over."""
        return float(
            0.1 ** sum(step // self.steps_per_epoch >= epoch for epoch in self.decay_epochs)
        )
