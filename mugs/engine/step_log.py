"""metrics.jsonl, progress, and the check for steps that were not finite."""

import json
import logging
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TextIO

import torch
from torch import Tensor

from mugs import distributed
from mugs.engine.calibration import EpochMeans
from mugs.engine.failures import NonFiniteError, write_nonfinite_record
from mugs.engine.metering import Meter
from mugs.engine.progress import Progress
from mugs.engine.step import StepResult
from pipeline.files import open_to_append

logger = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class LogSettings:
    """What the log needs of a run.

    batch_size: of all ranks together.
    rates: step -> learning rate and other values of its schedules.
    targets: epoch -> name of a loss (or "total") -> its mean in a known run, to compare with.
    """

    label: str
    total_steps: int
    steps_per_epoch: int
    batch_size: int
    log_steps: int
    seed: int
    rates: Callable[[int], Mapping[str, float]]
    targets: Mapping[int, Mapping[str, float]] = field(default_factory=dict)


class StepLog:
    """metrics.jsonl and progress of rank 0.

    It keeps device tensors and reads them only when a line is due: every read makes the host wait.
    """

    def __init__(self, run_dir: Path, settings: LogSettings, meter: Meter) -> None:
        self.run_dir = run_dir
        self.settings = settings
        self.meter = meter
        self.main = distributed.is_main()
        self.metrics: TextIO | None = None
        self.pending: list[StepResult] = []
        self.ids: list[Tensor] = []
        self.means = EpochMeans(settings.targets, settings.steps_per_epoch, {})

    def open(self, start: int) -> None:
        """Open the files and start the clocks before step `start`."""
        if self.main:
            self.run_dir.mkdir(parents=True, exist_ok=True)
            # Appended: a resumed run continues the file.
            self.metrics = open_to_append(self.run_dir / "metrics.jsonl")

        self.progress = Progress(
            self.settings.label,
            self.settings.total_steps,
            path=self.run_dir / "progress.json",
            start=start,
            quiet=not self.main,
            in_background=True,
        )
        self.waited = 0.0
        self.since = time.monotonic()
        self.last = start

    def record_step(self, step: int, result: StepResult, ids: Tensor, waited: float) -> None:
        """Note a step; write a line of means every `log_steps` steps."""
        self.pending.append(result)
        self.waited += waited
        self.ids.append(ids)
        self.last = step
        detail = ""
        if (step + 1) % self.settings.log_steps == 0 or step + 1 == self.settings.total_steps:
            detail = self._write(step)
        self.means.add(step, result)
        self._calibrate(step)
        self.progress.update(step + 1, items=self.settings.batch_size, detail=detail)

    def metadata(self) -> dict[str, Any]:
        """Return what a checkpoint keeps of the log."""
        return {"epoch_means": self.means.state()}

    def load_state(self, notes: Mapping[str, Any]) -> None:
        """Continue with the sums of a checkpoint."""
        self.means = EpochMeans(
            self.settings.targets, self.settings.steps_per_epoch, notes.get("epoch_means", {})
        )

    def _calibrate(self, step: int) -> None:
        comparison = self.means.compare_with_target(step)
        if comparison is None:
            return
        # Means that contain a NaN say nothing: raise first.
        self.check_finite()
        if self.main:
            logger.info("%s", comparison.format_line())
        self._put({"step": step, "epoch": comparison.epoch, "calibration": comparison.as_record()})

    def write_event(self, line: Mapping[str, Any], seconds: float) -> None:
        """Write a line of its own; its `seconds` do not count as those of training steps."""
        # Validation between two steps must not look like a slow step.
        self.since += seconds
        self._put(line)

    def _put(self, line: Mapping[str, Any]) -> None:
        if self.metrics is not None:
            self.metrics.write(json.dumps(line) + "\n")
            # A killed job keeps every line that was due.
            self.metrics.flush()

    def _write(self, step: int) -> str:
        steps = len(self.pending)
        seconds = time.monotonic() - self.since
        line = {
            "step": step,
            "epoch": step // self.settings.steps_per_epoch,
            **self._mean_losses(),
            **self.settings.rates(step),
            "images_per_second": self.settings.batch_size * steps / seconds,
            "step_ms": 1000 * seconds / steps,
            "data_wait_share": self.waited / seconds,
            **self.meter.fields(steps, seconds),
        }
        # Raise before the line is written: a NaN in metrics.jsonl is not JSON.
        self.check_finite()
        self._put(line)
        self.pending = []
        self.ids = []
        self.waited = 0.0
        self.since = time.monotonic()
        return (
            f"loss {line['loss']:.4f}, data wait {100 * line['data_wait_share']:.0f}%, "
            f"{line['tflops']:.2f} TFLOP/s, peak {line['peak_memory_mb']:.0f} MB"
        )

    def _mean_losses(self) -> dict[str, float]:
        """Return the means over the pending steps and all ranks."""
        names = ["loss", *(f"loss_{name}" for name in self.pending[0].losses)]
        # (steps, losses) in one tensor: a single all-reduce and a single wait for the device.
        values = torch.stack(
            [torch.stack([r.total, *r.losses.values()]) for r in self.pending]
        ).mean(dim=0)
        return dict(zip(names, distributed.all_reduce_mean(values).tolist(), strict=True))

    def check_finite(self) -> None:
        """Raise NonFiniteError, on all ranks, if a step since the last check was not finite."""
        if not self.pending:
            return
        # The one wait for the device.
        finite = torch.stack([r.finite for r in self.pending]).tolist()
        if not all(finite):
            bad = finite.index(False)
            # The pending results are those of the last len(finite) steps up to `self.last`.
            step = self.last - len(finite) + 1 + bad
            path = write_nonfinite_record(
                self.run_dir,
                step,
                step // self.settings.steps_per_epoch,
                self.settings.seed,
                self.ids[bad].tolist(),
                self.pending[bad],
            )
            raise NonFiniteError(
                f"loss or gradient not finite at step {step}. It changed neither weights nor "
                f"state, so the last checkpoint is good: start the run again to resume from it. "
                f"Samples and losses of this rank: {path}"
            )

    def close(self) -> None:
        """Close the files."""
        self.progress.close()
        if self.metrics is not None:
            self.metrics.close()
