"""What runs cost, by stage: GPU-hours, time, restarts."""

from collections.abc import Iterable
from dataclasses import dataclass, field
from datetime import datetime
from operator import attrgetter
from pathlib import Path

from pipeline.files import read_json
from results.energy import Energy, sum_energy_of_runs
from results.report.graph import Node
from results.runs import FinishedRun, group_by


@dataclass(frozen=True)
class Cost:
    """Sum over the runs of a stage; `earlier` are the seconds of all attempts but the last one."""

    stage: str
    runs: int
    gpu_hours: float
    seconds: float
    earlier: float
    restarts: int
    energy: Energy = field(default_factory=dict)


def sum_costs_by_stage(runs: Iterable[FinishedRun], root: Path) -> list[Cost]:
    """Return the costs of each stage, in the order of its first run, and their total at the end."""
    groups: dict[str, list[FinishedRun]] = group_by(runs, attrgetter("stage"))
    everything = [run for group in groups.values() for run in group]
    return [
        Cost(
            stage=stage,
            runs=len(group),
            gpu_hours=sum(run.gpu_hours for run in group),
            seconds=sum(run.seconds for run in group),
            earlier=sum(earlier_seconds(run, root) for run in group),
            restarts=sum(run.restarts for run in group),
            energy=sum_energy_of_runs(group),
        )
        for stage, group in [*groups.items(), ("all stages", everything)]
    ]


def sum_unfinished(nodes: Iterable[Node]) -> Cost:
    """Return what the attempts of runs that are not done cost: running, failed or canceled."""
    begun = [node for node in nodes if node.state != "done" and node.seconds]
    return Cost(
        stage="not done",
        runs=len(begun),
        gpu_hours=sum(node.gpu_hours for node in begun),
        seconds=sum(node.seconds for node in begun),
        earlier=0.0,
        restarts=0,
    )


def earlier_seconds(run: FinishedRun, root: Path) -> float:
    """Return the seconds of all attempts of a run but the last one; 0 if they are not recorded."""
    notes = sorted((root / run.folder / "attempts").glob("[0-9][0-9][0-9][0-9].json"))
    if not run.restarts or not notes or not run.finished:
        return 0.0
    # The manifest has the time of all attempts together. What the last one took is the time from
    # its start (Unix seconds in its record) to the end of the run.
    try:
        began = float((read_json(notes[-1], {"time": float}) or {})["time"])
        ended = datetime.strptime(run.finished, "%Y-%m-%dT%H:%M:%S%z").timestamp()
    except (ValueError, KeyError, TypeError):
        return 0.0
    # Clocks of two machines may disagree; a cost is never negative.
    return max(0.0, run.seconds - max(0.0, ended - began))


def format_run_time(seconds: float) -> str:
    """Return seconds as `42 s`, `3 min 05 s` or `2 h 10 min`."""
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60:02d} s"
    return f"{whole // 3600} h {whole % 3600 // 60:02d} min"
