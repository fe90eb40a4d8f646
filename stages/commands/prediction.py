"""What the runs that are not done will take: GPU-hours, time on the critical path, disk.

Runs whose floating-point operations are known (pretraining, fine-tuning) count at the rate that
finished runs of their kind had on this cluster, everything included: loading, checkpoints, starts.
Until there is one, a share of the GPU's peak is assumed. Other runs count with their time limit.
"""

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from pipeline.manifest import ManifestEntry
from pipeline.spec import StageRun
from pipeline.text import format_amount
from stages.commands.preflight import collect_input_configs

_ASSUMED_SHARE = 0.25  # of the peak, until a run is done; the loader and small networks keep it low
_ASSUMED_GPU = "A100"


@dataclass(frozen=True)
class RunCost:
    """What one run will take. `basis` is measured | assumed | limit | done."""

    hours: float
    gpu_hours: float
    basis: str


@dataclass
class Prediction:
    """What all runs will take, by run id, and what that rests on."""

    costs: dict[str, RunCost] = field(default_factory=dict)
    critical_path_hours: float = 0.0
    disk_gb: float = 0.0
    # TFLOP/s of a GPU by kind of run: stage and precision.
    rates: dict[str, float] = field(default_factory=dict)
    gpu: str = _ASSUMED_GPU

    @property
    def gpu_hours(self) -> float:
        """GPU-hours of all runs that are not done."""
        return sum(cost.gpu_hours for cost in self.costs.values())

    def count_gpu_hours(self, basis: str) -> float:
        """Return the GPU-hours of the runs with this basis."""
        return sum(cost.gpu_hours for cost in self.costs.values() if cost.basis == basis)

    def describe(self) -> str:
        """Return all in a sentence."""
        parts = []
        if measured := self.count_gpu_hours("measured"):
            rates = ", ".join(f"{kind} {rate:.0f}" for kind, rate in sorted(self.rates.items()))
            parts.append(
                f"{format_amount(measured)} at the rate of finished runs (TFLOP/s a GPU: {rates})"
            )
        if assumed := self.count_gpu_hours("assumed"):
            share = f"{100 * _ASSUMED_SHARE:.0f}% of the peak of an {self.gpu}"
            parts.append(f"{format_amount(assumed)} assuming {share}, as no such run is done")
        if limits := self.count_gpu_hours("limit"):
            parts.append(
                f"{format_amount(limits)} are the limits of runs whose operations are not counted"
            )
        what = f" ({'; '.join(parts)})" if parts else ""
        return (
            f"predicted: {format_amount(self.gpu_hours)} GPU-hours{what}, "
            f"{format_amount(self.critical_path_hours)} hours on the longest chain without waiting "
            f"for nodes, {format_amount(self.disk_gb)} GB or more of disk"
        )

    def to_json(self) -> dict[str, Any]:
        """Return all for programs."""
        return {
            "gpu_hours": self.gpu_hours,
            "critical_path_hours": self.critical_path_hours,
            "disk_gb": self.disk_gb,
            "tflops_per_gpu": self.rates,
            "assumed_peak_share": _ASSUMED_SHARE,
            "gpu": self.gpu,
            "runs": {run_id: asdict(cost) for run_id, cost in self.costs.items()},
        }


def predict_cost(
    runs: Sequence[StageRun],
    every: Sequence[StageRun],
    done: Mapping[str, ManifestEntry],
    gpu: str | None = None,
) -> Prediction:
    """Return what `runs` will take, of `every` run of the reproduction; `gpu` is the GPU's type."""
    by_id = {run.run_id: run for run in every}
    found = Prediction(gpu=_name_gpu(gpu))
    flops = {}
    for run in runs:
        inputs = collect_input_configs(run, by_id)
        flops[run.run_id] = run.config.estimate_flops(inputs)
        if run.run_id not in done:
            found.disk_gb += run.config.estimate_disk_gb(inputs)
    found.rates = _measure_rates(runs, flops, done)
    ends: dict[str, float] = {}
    for run in runs:  # in topological order
        cost = _predict_run(run, flops[run.run_id], done, found)
        found.costs[run.run_id] = cost
        waits = [ends.get(need, 0.0) for need in run.needs.values() if need not in run.watched]
        # What watches another run ends no earlier than that.
        watched = [ends.get(need, 0.0) for need in run.watched]
        ends[run.run_id] = max([max(waits, default=0.0) + cost.hours, *watched])
    found.critical_path_hours = max(ends.values(), default=0.0)
    return found


def _name_gpu(gpu: str | None) -> str:
    """Return the GPU in a word of a profile, such as `nvidia_a100_80gb`; else the assumed one."""
    from mugs.engine.peaks import PEAK_TFLOPS

    text = (gpu or "").upper()
    return next((name for name in PEAK_TFLOPS if name.upper() in text), _ASSUMED_GPU)


def _find_kind(run: StageRun) -> str:
    return f"{run.stage} {getattr(run.config, 'precision', 'fp32')}"


def _measure_rates(
    runs: Sequence[StageRun], flops: Mapping[str, float | None], done: Mapping[str, ManifestEntry]
) -> dict[str, float]:
    """Return the TFLOP/s of a GPU in finished runs, by their kind: the median."""
    rates: dict[str, list[float]] = {}
    for run in runs:
        entry = done.get(run.run_id)
        count = flops[run.run_id]
        if entry is not None and entry.gpu_hours and count:
            rates.setdefault(_find_kind(run), []).append(count / entry.gpu_hours / 3600 / 1e12)
    return {kind: statistics.median(found) for kind, found in rates.items()}


def _predict_run(
    run: StageRun, flops: float | None, done: Mapping[str, ManifestEntry], known: Prediction
) -> RunCost:
    from mugs.engine.peaks import device_peak_tflops

    need = run.resources
    if run.run_id in done:
        return RunCost(0.0, 0.0, "done")
    if flops is None or not need.gpus:
        return RunCost(need.hours, need.gpu_hours, "limit")
    basis = "measured"
    rate = known.rates.get(_find_kind(run))
    if rate is None:
        basis = "assumed"
        peak = device_peak_tflops(known.gpu, getattr(run.config, "precision", "fp32"))
        rate = _ASSUMED_SHARE * (peak or 0.0)
    gpu_hours = flops / (rate * 1e12) / 3600
    return RunCost(gpu_hours / need.gpus, gpu_hours, basis)
