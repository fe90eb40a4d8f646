"""Estimates from what earlier attempts measured: how early a job must be warned, how often a run should save."""

from __future__ import annotations

import math
from collections.abc import Iterable
from pathlib import Path

from pipeline import attempts
from pipeline.availability import Conditions, best_checkpoint_interval_s, effective_time_ratio
from pipeline.files import read_json
from pipeline.spec import StageRun
from slurm.submission.profile import ClusterProfile, time_limit_minutes

_SLOW_DISK_GB_S = 0.2  # a busy shared file system
_COPY_GB_S = 2.0  # from the device to the host, unpinned
_STEP_S, _REQUEUE_S, _LATE_S, _MARGIN_S = (
    30.0,
    30.0,
    30.0,
    30.0,
)  # Slurm looks at time limits every 30 s
_RESTART_S = 180.0
_PREEMPTED_EVERY_S = 7200.0


def estimate_save_seconds(run: StageRun, run_root: Path) -> float:
    """The longest that a save of this run took, else what the size of its state suggests."""
    measured = [float(note["seconds"]) for note in attempts.list_saves(run.run_dir(run_root))]
    return max(measured, default=run.config.state_gb() / _SLOW_DISK_GB_S)


def estimate_lead_seconds(profile: ClusterProfile, run: StageRun) -> int:
    """How long before its end Slurm should warn the job: the profile's, else time for a step, a save and a requeue.

    At most ten minutes or a fifth of the time limit, whichever is longer, and never more than half of it.
    """
    if profile.signal_delay_s is not None:
        return profile.signal_delay_s
    limit = 60 * time_limit_minutes(profile, run.resources)
    wanted = math.ceil(
        _STEP_S + estimate_save_seconds(run, profile.run_root) + _REQUEUE_S + _LATE_S + _MARGIN_S
    )
    return min(wanted, max(limit // 5, 600), limit // 2)


def advise_checkpoint_interval(runs: Iterable[StageRun], run_root: Path) -> list[str]:
    """A line per run that trains on GPUs: how often to save, by the model of `pipeline.availability`."""
    return [_advice(run, run_root) for run in runs if run.resources.gpus and run.config.state_gb()]


def _advice(run: StageRun, run_root: Path) -> str:
    durable, gpus = estimate_save_seconds(run, run_root), run.resources.gpus
    stall = run.config.state_gb() / _COPY_GB_S
    conditions = Conditions(
        gpus=gpus,
        stall_s=stall,
        durable_s=durable,
        restart_s=_RESTART_S,
        preempt_every_s=_PREEMPTED_EVERY_S,
    )
    interval = best_checkpoint_interval_s(conditions)
    step_s = _step_seconds(run, run_root)
    steps = f" (checkpoint_steps={round(interval / step_s)} at its last speed)" if step_s else ""
    ratio = 100 * effective_time_ratio(conditions, interval)
    return (
        f"{run.name}: on {gpus} GPUs a failure every {conditions.failure_every_s / 86400:.0f} days (rate of Llama 3), "
        f"a save stalls {stall:.1f} s: a checkpoint every {interval / 60:.0f} minutes loses least{steps}; "
        f"preempted every 2 h with a warning, {ratio:.1f}% of the time is training"
    )


def _step_seconds(run: StageRun, run_root: Path) -> float | None:
    """Seconds per step of the run's last attempt, where it told."""
    note = read_json(run.run_dir(run_root) / "progress.json") or {}
    rate, batch = note.get("rate"), getattr(run.config, "batch_size", None)
    return (
        float(batch) / float(rate) if rate and batch and note.get("rate_unit") == "img/s" else None
    )
