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
from slurm.submission.estimates import lead_seconds
from slurm.submission.profile import (
    ClusterProfile,
    end_of_script,
    job_command,
    misfit,
    sbatch_parameters,
)


@dataclass(frozen=True)
class Submission:
    """What became of one run: `action` is done | queued (as it was) | submitted."""

    run: StageRun
    action: str
    job_id: str | None = None


@dataclass(frozen=True)
class Waits:
    """Ids of the jobs that must have ended well, and of those that must have begun, before a job starts."""

    ended: tuple[str, ...] = ()
    begun: tuple[str, ...] = ()

    @property
    def dependency(self) -> str:
        """As sbatch spells it."""
        kinds = {"afterok": self.ended, "after": self.begun}
        return ",".join(
            [":".join((kind, *ids)) for kind, ids in kinds.items() if ids] + ["singleton"]
        )


@dataclass
class View:
    """What the queue and then the manifest said: a job that ends in between is done in the latter."""

    runs: Mapping[str, StageRun]
    jobs: dict[str, list[queue.QueuedJob]]
    done: set[str]

    def job(self, run_id: str) -> str | None:
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
        needed = {self.job(need) for need in run.needs.values() if need not in self.done | begun}
        fit = [
            job.job_id
            for job in jobs
            if job.alive and (job.state != "PENDING" or needed.issubset(job.parents))
        ]
        return fit[-1] if fit else None


def look(runs: Sequence[StageRun], run_root: Path) -> View:
    """The runs' jobs and what is done of the runs and their inputs; SlurmError when the queue cannot be asked."""
    jobs = queue.queued(runs, run_root, required=True)
    done = set(manifest.split(run_root, runs).done)
    outside = {need for run in runs for need in run.needs.values()} - {run.run_id for run in runs}
    by_id = {run.run_id: run for run in runs}
    return View(
        by_id, jobs, done | {need for need in outside if manifest.find_done(run_root, need)}
    )


def check(runs: Sequence[StageRun], profile: ClusterProfile) -> View:
    """What the queue and the manifest say of runs that can be queued.

    ConfigError when one that is not done does not fit the cluster, or one needs a run that is neither done nor in
    `runs`; SlurmError when the queue cannot be asked.
    """
    pending = manifest.split(profile.run_root, runs).pending
    if misfits := [line for run in pending if (line := misfit(profile, run.name, run.resources))]:
        raise ConfigError("; ".join(misfits))
    view = look(runs, profile.run_root)
    _check_inputs(runs, view)
    return view


def submit(runs: Sequence[StageRun], profile: ClusterProfile) -> list[Submission]:
    """Queue the runs that are neither done nor queued, in the given (topological) order.

    It may die anywhere and be run again, by several at once: a run is queued under its claim, after another look.
    Raises what `check` raises.
    """
    view = check(runs, profile)
    code: Path | None = None
    result = []
    for run in runs:
        if run.run_id in view.done:
            result.append(Submission(run, "done"))
        elif job_id := view.job(run.run_id):
            result.append(Submission(run, "queued", job_id))
        else:
            code = code or snapshot.take(profile.run_root)
            submission, view = _settle(run, runs, profile, code)
            result.append(submission)
    return result


def _check_inputs(runs: Sequence[StageRun], view: View) -> None:
    known = view.done | {run.run_id for run in runs}
    for run in runs:
        for role, need in run.needs.items():
            if need not in known:
                raise ConfigError(
                    f"{run.name}: its input {role!r} (run {need}) is not done; submit it too"
                )


def _settle(
    run: StageRun, runs: Sequence[StageRun], profile: ClusterProfile, code: Path
) -> tuple[Submission, View]:
    """Under the run's claim: look again, since others may have been here, and queue it if it is still missing."""
    root = profile.run_root
    with claims.claimed(run.run_dir(root)) as claim:
        view = look(runs, root)
        if run.run_id in view.done:
            return Submission(run, "done"), view
        if job_id := view.job(run.run_id):
            return Submission(run, "queued", job_id), view
        parents = {need: view.job(need) for need in run.needs.values() if need not in view.done}
        if lost := [view.runs[need].name for need, job_id in parents.items() if job_id is None]:
            raise queue.SlurmError(
                f"{run.name}: {', '.join(lost)} left the queue without being done; submit again"
            )
        jobs = {need: job_id for need, job_id in parents.items() if job_id}
        waits = Waits(
            ended=tuple(job_id for need, job_id in jobs.items() if need not in run.watched),
            begun=tuple(job_id for need, job_id in jobs.items() if need in run.watched),
        )
        queue.cancel(job.job_id for job in view.jobs.get(run.run_id, []))
        job_id = _queue(run, profile, waits, code, claim)
        queued = queue.QueuedJob(
            job_id, queue.job_name(run.run_id), "PENDING", "", waits.ended + waits.begun
        )
        view.jobs[run.run_id] = [queued]
        return Submission(run, "submitted", job_id), view


def _queue(
    run: StageRun, profile: ClusterProfile, waits: Waits, code: Path, claim: claims.Claim
) -> str:
    run_dir = runfile.write(profile.run_root, run)
    (run_dir / "logs").mkdir(exist_ok=True)
    write_atomic(run_dir / queue.SCRIPT, sbatch_text(run, profile, waits, code))
    if not claim.is_current():
        raise queue.SlurmError(
            f"{run.name}: somebody else has taken over submitting it; submit again to see"
        )
    job_id = queue.sbatch(run_dir / queue.SCRIPT)
    write_json_atomic(
        run_dir / queue.JOB_NOTE, {"job_id": job_id, "time": time.time(), "code": str(code)}
    )
    return job_id


def sbatch_text(run: StageRun, profile: ClusterProfile, waits: Waits, code: Path) -> str:
    """The batch script of one run, made by submitit.

    `singleton` keeps a second job of the same run, queued elsewhere meanwhile, from running beside it. The command is
    a plain one, not a pickle, so that a job is whole once sbatch has it, whatever becomes of the submission.
    """
    run_dir = run.run_dir(profile.run_root)
    built = submitit.SlurmExecutor(run_dir / "logs")
    parameters = sbatch_parameters(
        profile, run.resources, code=code, lead_s=lead_seconds(profile, run)
    )
    name = queue.job_name(run.run_id)
    teardown = end_of_script(profile, run_dir)
    built.update_parameters(
        **parameters, job_name=name, dependency=waits.dependency, teardown=teardown
    )
    return str(built._make_submission_file_text(job_command(profile, run_dir), "job"))
