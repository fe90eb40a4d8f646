"""Stage runs onto a cluster: one job per pending run, chained; submitting again changes nothing."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import submitit

from pipeline import manifest, runfile
from pipeline.files import write_atomic, write_json_atomic
from pipeline.spec import ConfigError, StageRun
from slurm.shared import queue
from slurm.submission import lock as claims
from slurm.submission import snapshot
from slurm.submission.estimates import estimate_lead_seconds
from slurm.submission.profile import (
    ClusterProfile,
    exit_handler_lines,
    find_gpu_shortages,
    job_command,
    sbatch_parameters,
)


@dataclass(frozen=True)
class Submission:
    """What became of one run: `action` is done | queued (as it was) | submitted."""

    run: StageRun
    action: str
    job_id: str | None = None


@dataclass(frozen=True)
class Dependencies:
    """Ids of the jobs that must have ended well, and of those that must have begun, before a job starts."""

    after_end: tuple[str, ...] = ()
    after_begin: tuple[str, ...] = ()

    @property
    def dependency(self) -> str:
        """As sbatch spells it."""
        kinds = {"afterok": self.after_end, "after": self.after_begin}
        return ",".join(
            [":".join((kind, *ids)) for kind, ids in kinds.items() if ids] + ["singleton"]
        )


@dataclass
class QueueState:
    """What the queue and then the manifest said: a job that ends in between is done in the latter."""

    runs: Mapping[str, StageRun]
    jobs: dict[str, list[queue.QueuedJob]]
    done: set[str]

    def usable_job_id(self, run_id: str) -> str | None:
        """Id of the run's job, if it has one that runs or can still run.

        A pending one must wait for the present jobs of all inputs that are not done: one that waits for a job that
        failed never runs, and one that waits for none would run too early. It no longer waits for the beginning of one
        that has begun.
        """
        run = self.runs.get(run_id)
        jobs = self.jobs.get(run_id, [])
        if run is None or not jobs:
            return None
        begun = {
            need
            for need in run.watched
            if any(job.state != "PENDING" for job in self.jobs.get(need, []))
        }
        needed = {
            self.usable_job_id(need) for need in run.needs.values() if need not in self.done | begun
        }
        fit = [
            job.job_id
            for job in jobs
            if job.can_run and (job.state != "PENDING" or needed.issubset(job.parents))
        ]
        return fit[-1] if fit else None


def load_queue_state(runs: Sequence[StageRun], run_root: Path) -> QueueState:
    """The runs' jobs and what is done of the runs and their inputs; SlurmError when the queue cannot be asked."""
    jobs = queue.find_jobs(runs, run_root, required=True)
    done = set(manifest.split_runs(run_root, runs).done)
    outside = {need for run in runs for need in run.needs.values()} - {run.run_id for run in runs}
    by_id = {run.run_id: run for run in runs}
    return QueueState(
        by_id, jobs, done | {need for need in outside if manifest.find_done(run_root, need)}
    )


def check_submission(runs: Sequence[StageRun], profile: ClusterProfile) -> QueueState:
    """What the queue and the manifest say of runs that can be queued.

    ConfigError when one that is not done does not fit the cluster, or one needs a run that is neither done nor in
    `runs`; SlurmError when the queue cannot be asked.
    """
    pending = manifest.split_runs(profile.run_root, runs).pending
    if shortages := find_gpu_shortages(profile, pending):
        raise ConfigError("; ".join(shortages))
    view = load_queue_state(runs, profile.run_root)
    _check_inputs(runs, view)
    return view


def submit(runs: Sequence[StageRun], profile: ClusterProfile) -> list[Submission]:
    """Queue the runs that are neither done nor queued, in the given (topological) order.

    It may die anywhere and be run again, by several at once: a run is queued under its claim, after another look.
    Raises what `check` raises.
    """
    view = check_submission(runs, profile)
    code: Path | None = None
    result = []
    for run in runs:
        if run.run_id in view.done:
            result.append(Submission(run, "done"))
        elif job_id := view.usable_job_id(run.run_id):
            result.append(Submission(run, "queued", job_id))
        else:
            code = code or snapshot.take_snapshot(profile.run_root)
            submission, view = _submit_locked(run, runs, profile, code)
            result.append(submission)
    return result


def _check_inputs(runs: Sequence[StageRun], view: QueueState) -> None:
    known = view.done | {run.run_id for run in runs}
    for run in runs:
        for role, need in run.needs.items():
            if need not in known:
                raise ConfigError(
                    f"{run.name}: its input {role!r} (run {need}) is not done; submit it too"
                )


def _submit_locked(
    run: StageRun, runs: Sequence[StageRun], profile: ClusterProfile, code: Path
) -> tuple[Submission, QueueState]:
    """Under the run's claim: look again, since others may have been here, and queue it if it is still missing."""
    root = profile.run_root
    with claims.submission_lock(run.run_dir(root)) as claim:
        view = load_queue_state(runs, root)
        if run.run_id in view.done:
            return Submission(run, "done"), view
        if job_id := view.usable_job_id(run.run_id):
            return Submission(run, "queued", job_id), view
        parents = {
            need: view.usable_job_id(need) for need in run.needs.values() if need not in view.done
        }
        if lost := [view.runs[need].name for need, job_id in parents.items() if job_id is None]:
            raise queue.SlurmError(
                f"{run.name}: {', '.join(lost)} left the queue without being done; submit again"
            )
        jobs = {need: job_id for need, job_id in parents.items() if job_id}
        waits = Dependencies(
            after_end=tuple(job_id for need, job_id in jobs.items() if need not in run.watched),
            after_begin=tuple(job_id for need, job_id in jobs.items() if need in run.watched),
        )
        queue.cancel_jobs(job.job_id for job in view.jobs.get(run.run_id, []))
        job_id = _call_sbatch(run, profile, waits, code, claim)
        queued = queue.QueuedJob(
            job_id, queue.job_name(run.run_id), "PENDING", "", waits.after_end + waits.after_begin
        )
        view.jobs[run.run_id] = [queued]
        return Submission(run, "submitted", job_id), view


def _call_sbatch(
    run: StageRun,
    profile: ClusterProfile,
    waits: Dependencies,
    code: Path,
    claim: claims.SubmissionLock,
) -> str:
    run_dir = runfile.write(profile.run_root, run)
    (run_dir / "logs").mkdir(exist_ok=True)
    write_atomic(run_dir / queue.SCRIPT, sbatch_text(run, profile, waits, code))
    if not claim.is_current():
        raise queue.SlurmError(
            f"{run.name}: somebody else has taken over submitting it; submit again to see"
        )
    job_id = queue.submit_script(run_dir / queue.SCRIPT)
    write_json_atomic(
        run_dir / queue.JOB_NOTE, {"job_id": job_id, "time": time.time(), "code": str(code)}
    )
    return job_id


def sbatch_text(run: StageRun, profile: ClusterProfile, waits: Dependencies, code: Path) -> str:
    """The batch script of one run, made by submitit.

    `singleton` keeps a second job of the same run, queued elsewhere meanwhile, from running beside it. The command is
    a plain one, not a pickle, so that a job is whole once sbatch has it, whatever becomes of the submission.
    """
    run_dir = run.run_dir(profile.run_root)
    built = submitit.SlurmExecutor(run_dir / "logs")
    parameters = sbatch_parameters(
        profile, run.resources, code=code, lead_s=estimate_lead_seconds(profile, run)
    )
    name = queue.job_name(run.run_id)
    teardown = exit_handler_lines(profile, run_dir)
    built.update_parameters(
        **parameters, job_name=name, dependency=waits.dependency, teardown=teardown
    )
    return str(built._make_submission_file_text(job_command(profile, run_dir), "job"))
