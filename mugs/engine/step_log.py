"""metrics.jsonl, progress and the check for non-finite steps of a pretraining run."""

import json
import logging
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any, TextIO

import torch
from torch import Tensor

from mugs.data.loader import Batch
from mugs.engine import distributed
from mugs.engine.calibration import EpochMeans
from mugs.engine.failures import NonFiniteError, write_failure
from mugs.engine.metering import Meter
from mugs.engine.progress import Progress
from mugs.engine.schedules import Schedule
from mugs.engine.step import StepResult
from mugs.engine.train_config import TrainConfig

logger = logging.getLogger(__name__)


class StepLog:
    """metrics.jsonl and progress of rank 0; holds device tensors and reads them only when a line is due."""

    def __init__(self, run_dir: Path, schedule: Schedule, config: TrainConfig, meter: Meter) -> None:
        self.run_dir, self.schedule, self.config, self.meter = run_dir, schedule, config, meter
        self.main = distributed.is_main()
        self.metrics: TextIO | None = None
        self.pending: list[StepResult] = []
        self.ids: list[Tensor] = []
        self.means = EpochMeans(config.calibration, schedule.steps_per_epoch, {})

    def open(self, start: int) -> None:
        """Before step `start`: open the files and start the clocks."""
        if self.main:
            self.run_dir.mkdir(parents=True, exist_ok=True)
            self.metrics = (self.run_dir / "metrics.jsonl").open("a", encoding="utf-8")
        path = self.run_dir / "progress.json" if self.main else None
        total = self.schedule.total_steps
        self.progress = Progress("pretrain", total, path=path, start=start, quiet=not self.main)
        self.waited, self.since = 0.0, time.monotonic()
        self.last = start

    def record(self, step: int, result: StepResult, batch: Batch, waited: float) -> None:
        """Note one step; every `log_steps` write a line of means."""
        self.pending.append(result)
        self.waited += waited
        self.ids.append(batch.ids)
        self.last = step
        detail = ""
        if (step + 1) % self.config.log_steps == 0 or step + 1 == self.schedule.total_steps:
            detail = self._write(step)
        self.means.add(step, result)
        self._calibrate(step)
        self.progress.update(step + 1, items=self.config.batch_size, detail=detail)

    def notes(self) -> dict[str, Any]:
        """What a checkpoint keeps of the log."""
        return {"epoch_means": self.means.state()}

    def load(self, notes: Mapping[str, Any]) -> None:
        """Go on with the sums of a checkpoint."""
        self.means = EpochMeans(self.config.calibration, self.schedule.steps_per_epoch, notes.get("epoch_means", {}))

    def _calibrate(self, step: int) -> None:
        comparison = self.means.compare(step)
        if comparison is None:
            return
        self.check_finite()
        if self.metrics is not None:
            logger.info("%s", comparison.line())
            line = {"step": step, "epoch": comparison.epoch, "calibration": comparison.record()}
            self.metrics.write(json.dumps(line) + "\n")
            self.metrics.flush()

    def _write(self, step: int) -> str:
        steps, seconds = len(self.pending), time.monotonic() - self.since
        line = {
            "step": step,
            "epoch": step // self.schedule.steps_per_epoch,
            **self._mean_losses(),
            "lr": self.schedule.lr(step),
            "weight_decay": self.schedule.wd(step),
            "teacher_momentum": self.schedule.teacher_momentum(step),
            "images_per_second": self.config.batch_size * steps / seconds,
            "step_ms": 1000 * seconds / steps,
            "data_wait_share": self.waited / seconds,
            **self.meter.fields(steps, seconds),
        }
        self.check_finite()
        if self.metrics is not None:
            self.metrics.write(json.dumps(line) + "\n")
            self.metrics.flush()
        self.pending, self.ids = [], []
        self.waited, self.since = 0.0, time.monotonic()
        text = f"loss {line['loss']:.4f}, data wait {100 * line['data_wait_share']:.0f}%"
        return f"{text}, {line['tflops']:.2f} TFLOP/s, peak {line['peak_memory_mb']:.0f} MB"

    def _mean_losses(self) -> dict[str, float]:
        """Means over the pending steps and all ranks."""
        names = ["loss", *(f"loss_{name}" for name in self.pending[0].losses)]
        values = torch.stack([torch.stack([r.total, *r.losses.values()]) for r in self.pending]).mean(dim=0)
        return dict(zip(names, distributed.all_reduce_mean(values).tolist(), strict=True))

    def check_finite(self) -> None:
        """Raise NonFiniteError, on all ranks, when a step since the last check was not finite."""
        if not self.pending:
            return
        finite = torch.stack([r.finite for r in self.pending]).tolist()  # the one wait for the device
        if not all(finite):
            bad = finite.index(False)
            step = self.last - len(finite) + 1 + bad
            epoch, ids = step // self.schedule.steps_per_epoch, self.ids[bad].tolist()
            path = write_failure(self.run_dir, step, epoch, self.config.seed, ids, self.pending[bad])
            raise NonFiniteError(
                f"loss or gradient not finite at step {step}; it changed no weight and no queue, the last "
                f"checkpoint is good, start again to go on from there. Samples and losses of this rank: {path}"
            )

    def close(self) -> None:
        """Close the files."""
        self.progress.close()
        if self.metrics is not None:
            self.metrics.close()
