"""Learning rate of the dense tasks, per iteration."""

from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class PolySchedule:
    """peak * (1 - step / total) ** power, times a linear warm-up that starts at `warmup_start`; constant decay."""

    peak_lr: float
    total_steps: int
    weight_decay: float = 0.05
    warmup_steps: int = 1500
    warmup_start: float = 1e-6
    power: float = 1.0

    def lr(self, step: int) -> float:
        """Learning rate of a step. The warm-up scales the rate that already decays, as in mmcv."""
        rate: float = self.peak_lr * (1 - step / self.total_steps) ** self.power
        return rate * self.warmup(step)

    def wd(self, step: int) -> float:
        """Weight decay of a step."""
        return self.weight_decay

    def warmup(self, step: int) -> float:
        """Factor of a step: from `warmup_start` to 1."""
        if step >= self.warmup_steps:
            return 1.0
        return 1 - (1 - step / self.warmup_steps) * (1 - self.warmup_start)

    def rates(self, step: int) -> dict[str, float]:
        """What the log notes."""
        return {"lr": self.lr(step)}
