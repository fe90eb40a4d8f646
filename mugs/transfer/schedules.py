"""Learning rates of the dense tasks, per iteration (mmcv)."""

from abc import ABC, abstractmethod
from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class WarmupSchedule(ABC):
    """A rate that decays, times a linear warm-up from `warmup_start` in its first steps; constant weight decay."""

    peak_lr: float
    weight_decay: float
    warmup_steps: int
    warmup_start: float

    @abstractmethod
    def decay(self, step: int) -> float:
        """Share of the peak at a step, without the warm-up."""

    def lr(self, step: int) -> float:
        """Learning rate of a step."""
        return self.peak_lr * self.decay(step) * self.warmup(step)

    def warmup(self, step: int) -> float:
        """Factor of a step: from `warmup_start` to 1."""
        if step >= self.warmup_steps:
            return 1.0
        return 1 - (1 - step / self.warmup_steps) * (1 - self.warmup_start)

    def wd(self, step: int) -> float:
        """Weight decay of a step."""
        return self.weight_decay

    def rates(self, step: int) -> dict[str, float]:
        """What the log notes."""
        return {"lr": self.lr(step)}


@dataclass(frozen=True, kw_only=True)
class PolySchedule(WarmupSchedule):
    """Segmentation: linearly to zero."""

    total_steps: int
    warmup_start: float = 1e-6

    def decay(self, step: int) -> float:
        """1 at the first step, 0 after the last."""
        return 1 - step / self.total_steps


@dataclass(frozen=True, kw_only=True)
class StepSchedule(WarmupSchedule):
    """Detection: a tenth after each of `decay_epochs`."""

    steps_per_epoch: int
    epochs: int
    decay_epochs: tuple[int, ...]

    @property
    def total_steps(self) -> int:
        """Optimizer steps of the run."""
        return self.steps_per_epoch * self.epochs

    def decay(self, step: int) -> float:
        """A power of a tenth."""
        share: float = 0.1 ** sum(
            step // self.steps_per_epoch >= epoch for epoch in self.decay_epochs
        )
        return share
