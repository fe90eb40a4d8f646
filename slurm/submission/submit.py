"""Submit stage runs to a cluster: one job per pending run, chained by dependencies.

Submitting is idempotent: what is done or already queued stays as it is.
"""

import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import submitit

from pipeline import attempts, manifest, runfile
from pipeline.files import CHECKSUM_KEY, write_atomic, write_json_atomic
from pipeline.ownership import ForeignOwnerError, keep_others_from_writing
from pipeline.spec import ConfigError, Resources, StageRun
from slurm.shared import queue
from slurm.shared.exit_codes import EXIT_INTERRUPTED
from slurm.submission.estimates import estimate_lead_seconds
from slurm.submission.lock import SubmissionLock, submission_lock
from slurm.submission.profile import (
    ClusterProfile,
    exit_handler_lines,
    find_gpu_shortages,
    job_command,
    profile_of_run,
    sbatch_parameters,
)
from slurm.submission.snapshot import checking_lines, find_snapshot_folder, take_snapshot


@dataclass(frozen=True)
class Submission:
    """What became of one run.

    `action` is done | queued (it was before) | submitted | skipped | deferred (no more jobs fit
    into the queue, or may be in it).
    """

    run: StageRun
    action: str
    job_id: str | None = None
    # Why it is skipped (another user has begun it, or a run that it needs) or deferred.
    reason: str = ""
    # The code of an earlier attempt, if this job goes on with other code.
    other_code: str = ""


@dataclass(frozen=True)
class Dependencies:
    """Ids of the jobs that must have ended well, or have begun, before a job may start."""

    after_end: list[str] = field(default_factory=list)
    after_begin: list[str] = field(default_factory=list)

    @property
    def dependency(self) -> str:
        """The value of sbatch's --dependency.

        `singleton` keeps a second job of the same run, queued by somebody else meanwhile, from
        running at the same time: both have the same name.
        """
        kinds = {"afterok": self.after_end, "after": self.after_begin}
        parts = [":".join((kind, *job_ids)) for kind, job_ids in kinds.items() if job_ids]
        return ",".join([*parts, "singleton"])


@dataclass
class QueueState:
    """What the queue said and, after it, the manifest.

    In this order a job that ends between the two questions is found done, not missing.
    """

    runs: Mapping[str, StageRun]
    jobs: dict[str, list[queue.QueuedJob]]
    done: set[str]

    def usable_job_id(self, run_id: str) -> str | None:
        """Return the id of a job of this run that runs or can still run.

        A pending job is usable only if it waits for the present jobs of all inputs that are not
        done: one that waits for a job that failed never runs, and one that waits for no job would
        run too early. It need not wait for the beginning of a job that has begun.
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
        needed = set(run.needs.values()) - self.done - begun
        waits_for = {self.usable_job_id(need) for need in needed}
        usable = [
            job.job_id
            for job in jobs
            if job.can_run and (job.state != "PENDING" or waits_for.issubset(job.parents))
        ]
        return usable[-1] if usable else None

    def look_again(self, run: StageRun, run_root: Path) -> None:
        """Ask again about a run and those that it needs, and that these need.

        Not about all runs: each of a thousand that are submitted is asked about once more.
        """
        asked: dict[str, StageRun] = {}
        waiting = [run]
        while waiting:
            each = waiting.pop()
            asked[each.run_id] = each
            waiting += [
                self.runs[need]
                for need in each.needs.values()
                if need in self.runs and need not in asked
            ]
        found = load_queue_state(list(asked.values()), run_root)
        for run_id in asked:
            self.jobs.pop(run_id, None)
        self.jobs.update(found.jobs)
        self.done = (self.done - set(asked)) | found.done


def load_queue_state(runs: Sequence[StageRun], run_root: Path) -> QueueState:
    """Return the jobs of these runs, and what is done of the runs and their inputs.

    Raises:
        SlurmError: the queue cannot be asked.
    """
    jobs = queue.find_jobs(runs, run_root)
    run_ids = {run_id for run in runs for run_id in (run.run_id, *run.needs.values())}
    done = set(manifest.find_all_done(run_root, run_ids))
    return QueueState({run.run_id: run for run in runs}, jobs, done)


def check_submission(runs: Sequence[StageRun], profile: ClusterProfile) -> QueueState:
    """Check that runs can be queued; return what the queue and the manifest say of them.

    Raises:
        ConfigError: a pending run does not fit the cluster, or needs a run that is neither done nor
            in `runs`.
        SlurmError: the queue cannot be asked.
    """
    pending = manifest.split_runs(profile.run_root, runs).pending
    if shortages := find_gpu_shortages(profile, pending):
        raise ConfigError("; ".join(shortages))
    state = load_queue_state(runs, profile.run_root)
    manifest.check_inputs(profile.run_root, runs, "submit it too")
    return state


def submit(
    runs: Sequence[StageRun],
    profile: ClusterProfile,
    *,
    break_lock: bool = False,
    leave_room: bool = False,
) -> list[Submission]:
    """Queue the runs that are neither done nor queued, in the given (topological) order.

    Runs that another user has begun are skipped, and so are those that need them. Once Slurm takes
    no more jobs of this user, the runs that are left are deferred, and with `leave_room` the last
    one that was submitted too, so that a keeper fits into the queue. So are those that have to wait
    for others by `max_at_once` of the profile.

    It may be killed at any point and run again, and several may run at once: a run is queued under
    its lock, after another look into the queue. With `break_lock`, the lock of another submission
    is taken over. Raises what `check_submission` raises.
    """
    keep_others_from_writing()
    state = check_submission(runs, profile)
    code: Path | None = None
    submissions: list[Submission] = []
    full = ""
    for run in runs:
        if run.run_id in state.done:
            submissions.append(Submission(run, "done"))
        elif job_id := state.usable_job_id(run.run_id):
            submissions.append(Submission(run, "queued", job_id))
        elif reason := why_skipped(run, profile.run_root, submissions):
            submissions.append(Submission(run, "skipped", reason=reason))
        elif reason := full or why_held_back(run, state, profile.max_at_once):
            submissions.append(_defer(run, profile.run_root, reason, break_lock=break_lock))
        else:
            code = code or take_snapshot(profile.run_root)
            try:
                submission = _submit_locked(run, state, profile, code, break_lock=break_lock)
            except queue.QueueFullError as error:
                full = str(error)
                submission = Submission(run, "deferred", reason=full)
            except queue.SlurmError as error:
                raise queue.SlurmError(f"{error}{_describe_progress(submissions, runs)}") from error
            submissions.append(submission)
    if full and leave_room:
        _take_back_last(submissions, profile.run_root, full)
    return submissions


def _defer(run: StageRun, run_root: Path, full: str, *, break_lock: bool) -> Submission:
    """Write the file of a run, from which a keeper submits it later."""
    try:
        run_dir = runfile.prepare_run_dir(run_root, run)
    except ForeignOwnerError as error:  # perhaps since a moment ago
        reason = runfile.find_other_beginner(run_root, run) or str(error)
        return Submission(run, "skipped", reason=reason)
    with submission_lock(run_dir, break_lock=break_lock):
        runfile.write_run_file(run_root, run)
    return Submission(run, "deferred", reason=full)


def _take_back_last(submissions: list[Submission], run_root: Path, full: str) -> None:
    """Cancel the last job that was submitted, unless it runs by now, and defer its run."""
    made = [index for index, each in enumerate(submissions) if each.action == "submitted"]
    if not made:
        return
    last = submissions[made[-1]]
    # No job that is queued needs it: those come later.
    queue.cancel_pending_jobs([str(last.job_id)])
    if queue.find_jobs([last.run], run_root):
        return
    # Without these it was never submitted, instead of canceled, which a keeper leaves alone.
    for name in (queue.JOB_NOTE, queue.SCRIPT):
        (last.run.run_dir(run_root) / name).unlink(missing_ok=True)
    submissions[made[-1]] = Submission(last.run, "deferred", reason=full)


def find_exit_code(submissions: Sequence[Submission], *, kept: bool) -> int:
    """Return 1 if a run was skipped, else 75 if some are deferred and no keeper submits them."""
    actions = {each.action for each in submissions}
    if "skipped" in actions:
        return 1
    return EXIT_INTERRUPTED if "deferred" in actions and not kept else 0


def why_skipped(run: StageRun, run_root: Path, before: Sequence[Submission]) -> str:
    """Return why a run is left out, given what became of those before it; "" if it is not."""
    skipped = [other.run for other in before if other.action == "skipped"]
    if missing := [other.name for other in skipped if other.run_id in run.needs.values()]:
        return f"needs {', '.join(missing)}; submit again once that is done"
    return runfile.find_other_beginner(run_root, run)


def why_held_back(run: StageRun, state: QueueState, limit: int | None) -> str:
    """Return why a run has to wait for others, if at most `limit` runs may be in the queue.

    Of these, none waits for another one to end: it would take a place from a run that can start.
    Returns "" if the run may be queued.
    """
    if limit is None:
        return ""
    rule = f"at most {limit} at once"
    waits_for = set(run.needs.values()) - state.done
    if any(need not in run.watched or not state.usable_job_id(need) for need in waits_for):
        return f"{rule}, and it needs runs that are not done"
    queued = [
        run_id
        for run_id, jobs in state.jobs.items()
        if run_id not in state.done and any(job.can_run for job in jobs)
    ]
    return f"{rule}, and {len(queued)} are in the queue" if len(queued) >= limit else ""


def _describe_progress(submissions: Sequence[Submission], runs: Sequence[StageRun]) -> str:
    """Return how far a submission came that Slurm refused to go on with, such as at a limit."""
    queued = sum(submission.action in ("queued", "submitted") for submission in submissions)
    left = len(runs) - len(submissions)
    return f". {queued} runs are queued, {left} are not; submit again later to queue the others"


def preview_scripts(runs: Sequence[StageRun], profile: ClusterProfile) -> Iterator[str]:
    """Yield the batch file of each run that is not done, as `submit` would write it.

    Ids of jobs and the code snapshot are not known yet; names stand in their place.
    """
    done = {run.run_id for run in manifest.split_runs(profile.run_root, runs).done.values()}
    names = {run.run_id: run.name for run in runs}
    code = find_snapshot_folder(profile.run_root) / "SNAPSHOT"
    if profile.max_at_once is not None:
        yield f"==> at most {profile.max_at_once} at once, each when all that it needs is done"
    for run in runs:
        if run.run_id in done:
            continue
        if reason := runfile.find_other_beginner(profile.run_root, run):
            yield f"==> {run.name}: {reason}"
            continue
        needs = [need for need in run.needs.values() if need not in done]
        jobs = {need: f"JOB_OF_{names.get(need, need)}" for need in needs}
        dependencies = Dependencies(
            after_end=[job for need, job in jobs.items() if need not in run.watched],
            after_begin=[job for need, job in jobs.items() if need in run.watched],
        )
        yield f"==> {run.run_dir(profile.run_root) / queue.SCRIPT}"
        yield sbatch_text(run, profile, dependencies, code)


def _submit_locked(
    run: StageRun,
    state: QueueState,
    profile: ClusterProfile,
    code: Path,
    *,
    break_lock: bool,
) -> Submission:
    """Take the run's lock, look into the queue again, and queue the run if it is still missing.

    What the queue says is noted in `state`, and so is the new job.
    """
    try:
        run_dir = runfile.prepare_run_dir(profile.run_root, run)
    except ForeignOwnerError as error:  # perhaps since a moment ago
        reason = runfile.find_other_beginner(profile.run_root, run) or str(error)
        return Submission(run, "skipped", reason=reason)
    with submission_lock(run_dir, break_lock=break_lock) as lock:
        state.look_again(run, profile.run_root)
        if run.run_id in state.done:
            return Submission(run, "done")
        if job_id := state.usable_job_id(run.run_id):
            return Submission(run, "queued", job_id)

        dependencies = Dependencies()
        for need in dict.fromkeys(run.needs.values()):  # one run may fill two roles
            if need in state.done:
                continue
            parent = state.usable_job_id(need)
            if parent is None:
                raise queue.SlurmError(
                    f"{run.name}: {state.runs[need].name} left the queue without being done; "
                    "submit again"
                )
            watched = need in run.watched
            (dependencies.after_begin if watched else dependencies.after_end).append(parent)

        # Jobs of this run that can never run would hold back the new one, because of `singleton`.
        queue.cancel_jobs(job.job_id for job in state.jobs.get(run.run_id, []))
        job_id = _call_sbatch(run, profile, dependencies, code, lock)
        # Later runs of this submission find their input in the queue without asking again.
        parents = (*dependencies.after_end, *dependencies.after_begin)
        name = queue.job_name(run_dir)
        state.jobs[run.run_id] = [queue.QueuedJob(job_id, name, "PENDING", "", parents)]
        other_code = find_other_code(run, profile, code)
        return Submission(run, "submitted", job_id, other_code=other_code)


def find_other_code(run: StageRun, profile: ClusterProfile, code: Path) -> str:
    """Return the snapshot of the last attempt if it is not `code`; "" if there is none."""
    versions = attempts.list_code_versions(run.run_dir(profile.run_root))
    last = versions[-1].get("snapshot") if versions else None
    return str(last) if last not in (None, code.name) else ""


def _call_sbatch(
    run: StageRun,
    profile: ClusterProfile,
    dependencies: Dependencies,
    code: Path,
    lock: SubmissionLock,
) -> str:
    run_dir = runfile.write_run_file(profile.run_root, run)
    (run_dir / "logs").mkdir(exist_ok=True)  # Slurm opens the output files, but makes no folder
    text = sbatch_text(run, profile, dependencies, code, checks=checking_lines(code))
    # For the reader only: sbatch gets the text itself, so nobody can change it in between. It holds
    # the environment of the profile.
    write_atomic(run_dir / queue.SCRIPT, text, private=True)
    if not lock.is_current():
        raise queue.SlurmError(
            f"{run.name}: another process has taken over submitting it; submit again to see its job"
        )
    job_id = queue.submit_script(text, run_dir, comment="comment" not in profile.sbatch)
    write_json_atomic(
        run_dir / queue.JOB_NOTE, {"job_id": job_id, "time": time.time(), "code": str(code)}
    )
    return job_id


class _ScriptWriter(submitit.SlurmExecutor):
    """Submitit's writer of batch scripts, which refuses to exist where there is no srun."""

    @classmethod
    def affinity(cls) -> int:
        """Claim to be on a cluster: a dry run shows the scripts anywhere."""
        return 2


def sbatch_text(
    run: StageRun,
    profile: ClusterProfile,
    dependencies: Dependencies,
    code: Path,
    *,
    checks: Sequence[str] = (),
) -> str:
    """Return the batch script of one run, made by submitit; `checks` are its first shell lines.

    The command is a plain one, not a pickle: so a job is complete once sbatch has it, whatever
    becomes of the submission, and a requeued job needs no file of submitit.
    """
    profile = profile_of_run(profile, run)
    run_dir = run.run_dir(profile.run_root)
    return render_script(
        profile,
        run.resources,
        folder=run_dir / "logs",
        name=queue.job_name(run_dir),
        dependency=dependencies.dependency,
        # The job refuses another run file than this one.
        command=f"{job_command(profile, run_dir)} {runfile.describe_run(run)[CHECKSUM_KEY]}",
        code=code,
        checks=checks,
        lead_s=estimate_lead_seconds(profile, run),
        teardown=exit_handler_lines(profile, run_dir),
    )


def render_script(
    profile: ClusterProfile,
    need: Resources,
    *,
    folder: Path,
    name: str,
    dependency: str,
    command: str,
    code: Path,
    checks: Sequence[str],
    lead_s: int,
    teardown: Sequence[str],
) -> str:
    """Return a batch script, made by submitit.

    Slurm's output goes into `folder`; `checks` are the first shell lines, `teardown` the last.
    """
    executor = _ScriptWriter(folder)
    parameters = sbatch_parameters(profile, need, code=code, lead_s=lead_s)
    parameters["setup"] = [*checks, *parameters["setup"]]
    executor.update_parameters(
        **parameters, job_name=name, dependency=dependency, teardown=list(teardown)
    )
    return str(executor._make_submission_file_text(command, "job"))
