"""Schedules of pretraining in closed form: learning rate, weight decay, EMA momentum."""

from dataclasses import dataclass

from mugs.engine.schedules import cosine_schedule, warmup_cosine_schedule


@dataclass(frozen=True, kw_only=True)
class PretrainSchedule:
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
        """Return the number of optimizer steps of the run."""
        return self.steps_per_epoch * self.epochs

    def lr(self, step: int) -> float:
        """Return the learning rate: linear warm-up from 0 to the peak, then cosine to its end."""
        warmup = self.steps_per_epoch * self.warmup_epochs
        return warmup_cosine_schedule(
            step, warmup, self.total_steps, start=0.0, peak=self.peak_lr, end=self.min_lr
        )

    def wd(self, step: int) -> float:
        """Return the weight decay: cosine from its first to its last value, without warm-up."""
        return cosine_schedule(self.weight_decay, self.weight_decay_end, step / self.total_steps)

    def teacher_momentum(self, step: int) -> float:
        """Return the EMA momentum of the teacher: cosine from its first value to 1."""
        return cosine_schedule(self.momentum, 1.0, step / self.total_steps)

    def rates(self, step: int) -> dict[str, float]:
        """Return all of them by their names in the log."""
        return {
            "lr": self.lr(step),
            "weight_decay": self.wd(step),
            "teacher_momentum": self.teacher_momentum(step),
        }
