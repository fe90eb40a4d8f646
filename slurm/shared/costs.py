"""What a run has cost so far, by the records and logs of its attempts."""

import time
from dataclasses import dataclass
from pathlib import Path

from pipeline import attempts
from slurm.shared.logs import log_path


@dataclass(frozen=True)
class Cost:
    """Running time of all attempts, and that time multiplied by the GPUs of each."""

    seconds: float = 0.0
    gpu_hours: float = 0.0


def count_gpus_here() -> int:
    """Return the number of GPUs of this machine."""
    # Device files, because this package does not import torch, which would take seconds.
    return len(list(Path("/dev").glob("nvidia[0-9]*")))


def sum_energy(run_dir: Path) -> dict[str, float | int] | None:
    """Return the kWh of all attempts, and how many of their GPUs were measured; None if none was.

    An attempt that was killed has no measurement: then the sum is a lower limit.
    """
    joules = 0.0
    measured = expected = 0
    for number in attempts.list_attempts(run_dir):
        found = attempts.list_energy(run_dir, number)
        joules += sum(found.values())
        measured += len(found)
        gpus = attempts.read_attempt(run_dir, number).get("gpus")
        expected += max(len(found), gpus if isinstance(gpus, int) else 0)
    if not measured:
        return None
    return {"kwh": round(joules / 3.6e6, 6), "measured": measured, "of": expected}


def sum_attempts(run_dir: Path, *, gpus: int, running: int | None = None) -> Cost:
    """Return what all attempts of a run have cost, however they ended; `running` still runs.

    `gpus` is for attempts whose record does not tell. An attempt that was killed records no end, so
    all but the running one count from their start to their last log line.
    """
    seconds = 0.0
    gpu_hours = 0.0
    for number in attempts.list_attempts(run_dir):
        note = attempts.read_attempt(run_dir, number)
        started = float(note.get("time", 0.0))
        if not started:
            continue  # its record cannot be read
        logged = _read_change_time(log_path(run_dir, number, 0)) or started
        lasted = max(0.0, (time.time() if number == running else logged) - started)
        seconds += lasted
        gpu_hours += lasted * int(note.get("gpus", gpus)) / 3600
    return Cost(seconds, gpu_hours)


def _read_change_time(path: Path) -> float | None:
    try:
        return path.stat().st_mtime
    except OSError:
        return None
