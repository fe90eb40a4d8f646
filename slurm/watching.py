"""Watch a reproduction until it is finished or nothing goes on any more."""

import time
from collections.abc import Iterator, Sequence
from pathlib import Path

from pipeline.spec import StageRun
from slurm.shared import queue
from slurm.shared.keeper_notes import list_open_keepers
from slurm.status import RunStatus, collect_status

QUIET_LOOKS = 3
_GOING_ON = ("running", "queued", "unknown")


def watch_until_over(
    runs: Sequence[StageRun], run_root: Path, *, pause_s: float
) -> Iterator[list[RunStatus]]:
    """Yield the status of the runs again and again; the last one is that at the end.

    Several looks in a row have to be quiet: between two runs of this machine, and before a keeper
    submits again what Slurm ended, no run is running or queued for a moment.
    """
    quiet = 0
    while quiet < QUIET_LOOKS:
        found = collect_status(runs, run_root)
        yield found
        states = {status.state for status in found}
        if states == {"done"}:
            return
        going_on = bool(states & {*_GOING_ON}) or is_kept(runs, run_root)
        quiet = 0 if going_on else quiet + 1
        if quiet < QUIET_LOOKS:
            time.sleep(pause_s)


def is_kept(runs: Sequence[StageRun], run_root: Path) -> bool:
    """Return whether a keeper of the runs is, or may be, in the queue."""
    names = list_open_keepers(runs, run_root)
    try:
        return bool(names) and bool(queue.find_jobs_named(names))
    except queue.SlurmError:
        return True
