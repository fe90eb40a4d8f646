"""Learning rates of fine-tuning in closed form, per step or per epoch."""

from dataclasses import dataclass

from mugs.engine.schedules import cosine_schedule, warmup_cosine_schedule
from mugs.finetune.config import FinetuneConfig, RateOptions


@dataclass(frozen=True)
class FinetuneSchedule:
    """Learning rate and weight decay at every optimizer step, before layer decay."""

    options: RateOptions
    peak: float
    weight_decay: float
    epochs: int
    steps_per_epoch: int

    @property
    def total_steps(self) -> int:
        """Optimizer steps of the run."""
        return self.epochs * self.steps_per_epoch

    def lr(self, step: int) -> float:
        """Learning rate of a step."""
        options = self.options
        if options.unit == "epoch":
            return self._per_epoch(max(step // self.steps_per_epoch - options.epoch_lag, 0))
        warmup = options.warmup_epochs * self.steps_per_epoch
        return warmup_cosine_schedule(
            step,
            warmup,
            self.total_steps,
            start=options.warmup_lr,
            peak=self.peak,
            end=options.min_lr,
        )

    def wd(self, step: int) -> float:
        """Weight decay, the same at every step."""
        return self.weight_decay

    def rates(self, step: int) -> dict[str, float]:
        """All of them, by the names of the log."""
        return {"lr": self.lr(step), "weight_decay": self.wd(step)}

    def _per_epoch(self, epoch: int) -> float:
        """Linear over the warm-up, end point left out, then the cosine over all epochs from where it is by then."""
        start, warmup = self.options.warmup_lr, self.options.warmup_epochs
        if epoch < warmup:
            return start + (self.peak - start) * epoch / warmup
        return cosine_schedule(self.peak, self.options.min_lr, epoch / self.epochs)


def build_finetune_schedule(config: FinetuneConfig, steps_per_epoch: int) -> FinetuneSchedule:
    """The schedule of a run."""
    return FinetuneSchedule(
        config.rate, config.peak_lr, config.weight_decay, config.epochs, steps_per_epoch
    )
