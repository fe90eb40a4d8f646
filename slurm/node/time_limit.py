"""Whether a job that was stopped may start again: not if it would stop at the same place for ever.

A stage that saves nothing before it is stopped starts from the beginning every time. If its time
limit is the cause, the next start would meet it too.
"""

import os
from collections.abc import Mapping
from pathlib import Path

from pipeline import attempts
from slurm.node.signals import LEAD_SECONDS_VARIABLE
from slurm.shared.queue import parse_duration_s

# Slurm looks at time limits every 30 s, and may warn up to 60 s too early.
_WARNING_VARIES_S = 90.0


def why_not_resume(run_dir: Path, attempt: int, job: Mapping[str, str]) -> str | None:
    """Return why an attempt that was stopped must not be followed by another; None if it may be.

    Args:
        run_dir: folder of the run.
        attempt: the attempt that was stopped.
        job: what Slurm says of its job, as the fields of `scontrol show job`.
    """
    if not reached_time_limit(job) or attempts.has_saved(run_dir, attempt):
        return None
    limit_min = parse_duration_s(job["TimeLimit"]) / 60
    return (
        f"it reached its time limit of {limit_min:g} minutes and had saved nothing to go on from, "
        "so the next attempt would stop there too: give it more time (resources.hours, and "
        "max_hours of the cluster profile) or more CPUs"
    )


def reached_time_limit(job: Mapping[str, str]) -> bool:
    """Return whether the time limit is why Slurm stops a job, and not a preemption."""
    lead_s = float(os.environ.get(LEAD_SECONDS_VARIABLE, "120"))
    ran_s = parse_duration_s(job.get("RunTime", ""))
    limit_s = parse_duration_s(job.get("TimeLimit", "UNLIMITED"))
    return ran_s >= limit_s - lead_s - _WARNING_VARIES_S
