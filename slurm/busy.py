"""Which run folders are in use: queued, running on the cluster, or running here."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from pipeline import attempts
from pipeline.atomic import read_json
from slurm import queue


def busy(folders: Mapping[Path, str]) -> dict[Path, str]:
    """Of run folders with their run ids those in use, and how. SlurmError where Slurm is here and does not answer.

    Where there is no Slurm, a run that was submitted and has not ended since may be in a queue: it counts as in use.
    """
    asked = queue.available()
    jobs = queue.named(folders.values()) if asked else {}
    found = {}
    for folder, run_id in folders.items():
        if run_id in jobs:
            found[folder] = f"is job {jobs[run_id].job_id}, {jobs[run_id].state}"
        elif attempts.running_here(folder):
            found[folder] = "is running on this machine"
        elif not asked and (note := read_json(folder / queue.JOB_NOTE)) and not _ended(folder):
            found[folder] = f"may be job {note.get('job_id')} of a cluster that cannot be asked from here"
    return found


def _ended(folder: Path) -> bool:
    """Whether the newest attempt said that no other one follows."""
    failure = attempts.failure(folder)
    return failure is not None and bool(failure.verdict)
