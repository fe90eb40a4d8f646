"""Mean losses of whole epochs, compared with those of a known run."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from mugs.distributed import all_reduce_mean
from mugs.engine.step import StepResult


@dataclass(frozen=True)
class CalibrationComparison:
    """Mean losses of an epoch beside their targets.

    They are means over `steps` of the epoch's `of` steps, and over all ranks.
    """

    epoch: int
    ours: dict[str, float]
    target: dict[str, float]
    steps: int
    of: int

    @property
    def deviation(self) -> dict[str, float]:
        """Return the deviation of ours from the target, in percent of the target."""
        return {name: 100 * (self.ours[name] / target - 1) for name, target in self.target.items()}

    def format_line(self) -> str:
        """Return one line for a log."""
        parts = [
            f"{n} {self.ours[n]:.4f} (target {t:.4f}, {self.deviation[n]:+.1f}%)"
            for n, t in self.target.items()
        ]
        partial = f" over {self.steps} of {self.of} steps only" if self.steps < self.of else ""
        return f"calibration, epoch {self.epoch}{partial}: {', '.join(parts)}"

    def as_record(self) -> dict[str, Any]:
        """Return the comparison for a JSON file."""
        return {
            "ours": self.ours,
            "target": self.target,
            "deviation_percent": self.deviation,
            "partial": self.steps < self.of,
        }


class EpochMeans:
    """Sums of the losses of the current epoch, kept on the device and saved in checkpoints.

    All ranks call every method at the same steps. Epochs without a target cost nothing.
    """

    def __init__(
        self,
        targets: Mapping[int, Mapping[str, float]],
        steps_per_epoch: int,
        state: Mapping[str, Any],
    ):
        self.targets = targets
        self.steps_per_epoch = steps_per_epoch
        # The checkpoint may come from an epoch that has no target, or no longer has one.
        state = state if state.get("epoch") in targets else {}
        self.epoch = int(state.get("epoch", -1))
        self.steps = int(state.get("steps", 0))
        self.names: list[str] = list(state.get("sums", {}))
        sums = torch.tensor(list(state.get("sums", {}).values()), dtype=torch.float64)
        self.sums: Tensor | None = sums if self.names else None

    def add(self, step: int, result: StepResult) -> None:
        """Add the losses of a step."""
        epoch = step // self.steps_per_epoch
        if epoch not in self.targets:
            return
        if epoch != self.epoch:
            self.epoch = epoch
            self.steps = 0
            self.sums = None
        self.names = ["total", *result.losses]
        # In fp64 and on the device: an epoch has thousands of steps, and no step may wait for the
        # host.
        values = torch.stack([result.total, *result.losses.values()]).double()
        self.sums = values if self.sums is None else self.sums.to(values.device) + values
        self.steps += 1

    def compare_with_target(self, step: int) -> CalibrationComparison | None:
        """Return the finished epoch beside its target; None within an epoch or without a target."""
        if (
            (step + 1) % self.steps_per_epoch
            or self.sums is None
            or step // self.steps_per_epoch != self.epoch
        ):
            return None
        means = dict(
            zip(self.names, (all_reduce_mean(self.sums) / self.steps).tolist(), strict=True)
        )
        # A variant without one of the losses is compared by the others.
        target = {name: value for name, value in self.targets[self.epoch].items() if name in means}
        return CalibrationComparison(
            self.epoch, {n: means[n] for n in target}, target, self.steps, self.steps_per_epoch
        )

    def state(self) -> dict[str, Any]:
        """Return what a resumed run needs: the sums so far, averaged over ranks."""
        if self.sums is None:
            return {}
        # Every rank continues from the mean over ranks, so their number may change on resume.
        sums = dict(zip(self.names, all_reduce_mean(self.sums).tolist(), strict=True))
        return {"epoch": self.epoch, "steps": self.steps, "sums": sums}
