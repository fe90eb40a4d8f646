"""Per-iteration schedules in closed form (released code; recipe of the paper's appendix)."""

import math
from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class Schedule:
    """Learning rate, weight decay and teacher momentum at every optimizer step."""

    steps_per_epoch: int
    epochs: int
    warmup_epochs: int
    peak_lr: float
    min_lr: float
    weight_decay: float
    weight_decay_end: float
    momentum: float

    @property
    def total_steps(self) -> int:
        """Optimizer steps of the run."""
        return self.steps_per_epoch * self.epochs

    def lr(self, step: int) -> float:
        """linspace(0, peak) over the warm-up, end point included, then cosine from peak towards the minimum."""
        warmup = self.steps_per_epoch * self.warmup_epochs
        if step < warmup:
            return self.peak_lr * step / max(warmup - 1, 1)
        progress = (step - warmup) / (self.total_steps - warmup)
        return self.min_lr + 0.5 * (self.peak_lr - self.min_lr) * (1 + math.cos(math.pi * progress))

    def wd(self, step: int) -> float:
        """Cosine from the start to the end value, no warm-up."""
        return _cosine(self.weight_decay, self.weight_decay_end, step / self.total_steps)

    def teacher_momentum(self, step: int) -> float:
        """Cosine from the start value to 1."""
        return _cosine(self.momentum, 1.0, step / self.total_steps)

    def rates(self, step: int) -> dict[str, float]:
        """All of them, by the names of the log."""
        return {"lr": self.lr(step), "weight_decay": self.wd(step), "teacher_momentum": self.teacher_momentum(step)}


def _cosine(start: float, end: float, progress: float) -> float:
    return end + 0.5 * (start - end) * (1 + math.cos(math.pi * progress))
