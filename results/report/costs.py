"""What runs cost: GPU-hours, time, restarts, by stage."""

import json
from collections.abc import Iterable
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path

from results.runs import FinishedRun


@dataclass(frozen=True)
class Cost:
    """Sum over the runs of a stage. `earlier` are the seconds of attempts before the one that finished."""

    stage: str
    runs: int
    gpu_hours: float
    seconds: float
    earlier: float
    restarts: int


def sum_costs_by_stage(runs: Iterable[FinishedRun], root: Path) -> list[Cost]:
    """Costs of each stage, in the order in which the stages first come, and their total last."""
    groups: dict[str, list[FinishedRun]] = {}
    for run in runs:
        groups.setdefault(run.stage, []).append(run)
    everything = [run for group in groups.values() for run in group]
    return [
        _cost(stage, group, root) for stage, group in [*groups.items(), ("all stages", everything)]
    ]


def _cost(stage: str, runs: list[FinishedRun], root: Path) -> Cost:
    return Cost(
        stage=stage,
        runs=len(runs),
        gpu_hours=sum(run.gpu_hours for run in runs),
        seconds=sum(run.seconds for run in runs),
        earlier=sum(earlier_seconds(run, root) for run in runs),
        restarts=sum(run.restarts for run in runs),
    )


def earlier_seconds(run: FinishedRun, root: Path) -> float:
    """Seconds of a run's attempts before the last one, from its record of attempts; 0 where there is none."""
    notes = sorted((root / run.folder / "attempts").glob("[0-9][0-9][0-9][0-9].json"))
    if not run.restarts or not notes or not run.finished:
        return 0.0
    try:
        began = float(json.loads(notes[-1].read_text(encoding="utf-8"))["time"])
        ended = datetime.strptime(run.finished, "%Y-%m-%dT%H:%M:%S%z").timestamp()
    except (ValueError, KeyError, OSError):
        return 0.0
    return max(0.0, run.seconds - max(0.0, ended - began))


def format_run_time(seconds: float) -> str:
    """`42 s`, `3 min 05 s`, `2 h 10 min`."""
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60:02d} s"
    return f"{whole // 3600} h {whole % 3600 // 60:02d} min"
