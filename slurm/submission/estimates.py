"""Estimates from earlier attempts: how early to warn a job, and how often a run should save."""

import math
from collections.abc import Iterable
from pathlib import Path

from pipeline import attempts
from pipeline.availability import Conditions, best_checkpoint_interval_s, effective_time_ratio
from pipeline.files import collect_unreadable
from pipeline.spec import StageRun
from pipeline.text import join_equal
from slurm.shared.progress import read_progress
from slurm.submission.profile import ClusterProfile, time_limit_minutes

# Assumed until there is a measurement.
_SLOW_DISK_GB_S = 0.2  # a busy shared file system
_COPY_GB_S = 2.0  # from the device to pageable host memory
_RESTART_S = 180.0  # from a stop to the first new step, with a short wait in the queue
_PREEMPTED_EVERY_S = 7200.0
# What the lead time must hold besides the save, in seconds: the step under way, the requeue, a
# warning that comes late (Slurm checks time limits every 30 s), and a margin.
LEAD_BESIDES_SAVE_S = 30.0 + 30.0 + 30.0 + 30.0


def estimate_save_seconds(run: StageRun, run_root: Path) -> float:
    """Return the longest that a save of this run took, else what the size of its state suggests."""
    saves = attempts.list_saves(run.run_dir(run_root))
    measured = (float(note["seconds"]) for note in saves if "seconds" in note)
    return max(measured, default=run.config.estimate_checkpoint_gb() / _SLOW_DISK_GB_S)


def estimate_lead_seconds(profile: ClusterProfile, run: StageRun) -> int:
    """Return how many seconds before its end Slurm should warn the job.

    The profile's `signal_delay_s`, else time for a step, a save and a requeue: at most ten minutes
    or a fifth of the time limit, whichever is longer. Never more than half of the limit: a short
    run that saves nothing would be stopped as soon as it begins.
    """
    limit = 60 * time_limit_minutes(profile, run.resources)
    if profile.signal_delay_s is not None:
        return min(profile.signal_delay_s, limit // 2)
    wanted = math.ceil(estimate_save_seconds(run, profile.run_root) + LEAD_BESIDES_SAVE_S)
    return min(wanted, max(limit // 5, 600), limit // 2)


def advise_checkpoint_interval(runs: Iterable[StageRun], run_root: Path) -> list[str]:
    """Return how often runs that train on GPUs should save, by `pipeline.availability`.

    A line for all runs with the same answer.
    """
    lines: list[tuple[str, str]] = []
    for run in runs:
        if not (run.resources.gpus and run.config.estimate_checkpoint_gb()):
            continue
        with collect_unreadable() as unreadable:
            advice = _advise(run, run_root)
        parts = [advice, *(f"unreadable: {path}" for path in unreadable)]
        lines.append((run.name, "; ".join(parts)))
    return join_equal(lines)


def _advise(run: StageRun, run_root: Path) -> str:
    conditions = Conditions(
        gpus=run.resources.gpus,
        stall_s=run.config.estimate_checkpoint_gb() / _COPY_GB_S,
        durable_s=estimate_save_seconds(run, run_root),
        restart_s=_RESTART_S,
        preempt_every_s=_PREEMPTED_EVERY_S,
    )
    interval_s = best_checkpoint_interval_s(conditions)
    step_s = _measure_step_seconds(run, run_root)
    steps = f" (checkpoint_steps={round(interval_s / step_s)} at its last speed)" if step_s else ""
    return (
        f"advice: save a checkpoint every {interval_s / 60:.0f} minutes{steps}. "
        f"Estimate for {conditions.gpus} GPUs: one failure every "
        f"{conditions.failure_every_s / 86400:.0f} days (failure rate of Llama 3's training); "
        f"each save stops the training for {conditions.stall_s:.1f} s. If the job is preempted "
        f"every 2 hours, with a warning, {100 * effective_time_ratio(conditions, interval_s):.1f}% "
        "of the time is training"
    )


def _measure_step_seconds(run: StageRun, run_root: Path) -> float | None:
    """Return the seconds per step of the run's last attempt, if it recorded its speed."""
    note = read_progress(run.run_dir(run_root))
    batch_size = getattr(run.config, "batch_size", None)
    rate = note.get("rate") or 0.0
    if not batch_size or rate <= 0 or note.get("rate_unit") != "img/s":
        return None
    return float(batch_size) / float(rate)
