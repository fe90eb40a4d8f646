"""Learning rate schedules of fine-tuning in closed form, per step or per epoch."""

from dataclasses import dataclass

from mugs.engine.schedules import cosine_schedule, warmup_cosine_schedule
from mugs.finetune.config import FinetuneConfig


@dataclass(frozen=True)
class FinetuneSchedule:
    """Learning rate and weight decay at every optimizer step, before layer decay."""

    config: FinetuneConfig
    steps_per_epoch: int

    @property
    def total_steps(self) -> int:
        """Optimizer steps of the run."""
        return self.config.epochs * self.steps_per_epoch

    def lr(self, step: int) -> float:
        """Return the learning rate of a step."""
        options = self.config.rate
        if options.unit == "epoch":
            # The released scripts step timm's scheduler with the epoch just finished, so epochs 0
            # and 1 both run at the first value (E12): `epoch_lag` is 1 then.
            return self._per_epoch(max(step // self.steps_per_epoch - options.epoch_lag, 0))
        return warmup_cosine_schedule(
            step,
            options.warmup_epochs * self.steps_per_epoch,
            self.total_steps,
            start=options.warmup_lr,
            peak=self.config.peak_lr,
            end=options.min_lr,
        )

    def wd(self, step: int) -> float:
        """Return the weight decay, the same at every step."""
        return self.config.weight_decay

    def rates(self, step: int) -> dict[str, float]:
        """Return all of them, by the names of the log."""
        return {"lr": self.lr(step), "weight_decay": self.wd(step)}

    def _per_epoch(self, epoch: int) -> float:
        """Follow timm's `CosineLRScheduler`, which counts the warm-up as part of the cosine."""
        # Linear without the end point. The cosine runs over all epochs, so after the warm-up the
        # rate goes on below the peak.
        options = self.config.rate
        peak = self.config.peak_lr
        if epoch < options.warmup_epochs:
            return options.warmup_lr + (peak - options.warmup_lr) * epoch / options.warmup_epochs
        return cosine_schedule(peak, options.min_lr, epoch / self.config.epochs)
