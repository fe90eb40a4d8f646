"""State of every run, from the manifest, the attempts, the progress file and the queue.

While Slurm does not answer, the state of a run that may have a job is `unknown`.
"""

import json
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from pipeline import attempts, manifest, runfile
from pipeline.files import FormatVersionError, collect_unreadable, measure_age
from pipeline.ownership import find_foreign_owner
from pipeline.spec import StageRun
from pipeline.text import format_count
from slurm.shared import nodes, queue
from slurm.shared.active_runs import ask_for_jobs, may_have_job
from slurm.shared.costs import Cost, sum_attempts
from slurm.shared.exit_codes import EXIT_INTERRUPTED
from slurm.shared.logs import find_newest_log, read_last_line
from slurm.shared.progress import FILE_NAME, read_progress

_FRESH_S = 180.0  # progress is written more often than that
_ACTIVE = ("RUNNING", "COMPLETING", "SUSPENDED", "STOPPED", "SIGNALING", "STAGE_OUT")
_TAKEN = ("PREEMPTED", "NODE_FAIL", "BOOT_FAIL")  # ended by Slurm, for no fault of the run
_NOT_OVER = (*_ACTIVE, "PENDING", "CONFIGURING", "REQUEUED")


@dataclass(frozen=True)
class RunStatus:
    """State of one run, and details of it.

    `state` is done | running | queued | blocked | failed | canceled | waiting | unknown. A blocked
    run can never start: its job cannot, or newer code has recorded it as done. Of an unknown one,
    Slurm did not tell whether it has a job, or its folder cannot be read.
    """

    run: StageRun
    state: str
    detail: str = ""
    job_id: str | None = None
    log: str | None = None
    # Of all attempts so far, however they ended.
    cost: Cost = field(default_factory=Cost)


def collect_status(runs: Sequence[StageRun], run_root: Path) -> list[RunStatus]:
    """Return the status of the runs, in the given order; works with and without Slurm.

    A record that cannot be read counts as missing, and is named in the detail of its run.
    """
    # The queue is asked first: a job that ends in between is then found done, not missing.
    jobs, silence = ask_for_jobs(runs, run_root)
    records = _read_entries(runs, run_root)
    names = {run.run_id: run.name for run in runs}
    found = []
    for run in runs:
        owner = None
        run_dir = run.run_dir(run_root)
        with collect_unreadable() as unreadable:
            try:
                owner = find_foreign_owner(run_dir)
                status = _find_status(run, run_dir, records, names, jobs, silence)
                status = replace(status, cost=_sum_cost(status, run_dir, records.done))
            except OSError as error:
                where = error.filename or run_dir
                status = RunStatus(run, "unknown", f"unreadable: {where}: {error.strerror}")
        unreadable = [*records.unreadable.get(run.run_id, ()), *unreadable]
        found.append(_add_remarks(status, owner, unreadable))
    return found


@dataclass
class _Entries:
    """The entries of runs that are done; by run id, what cannot be read and what is refused."""

    done: dict[str, manifest.ManifestEntry] = field(default_factory=dict)
    unreadable: dict[str, list[Path]] = field(default_factory=dict)
    refused: dict[str, str] = field(default_factory=dict)


def _read_entries(runs: Sequence[StageRun], run_root: Path) -> _Entries:
    found = _Entries()
    # One listing, since most of thousands of runs may have no entry.
    recorded = {run.run_id for run in runs}
    with suppress(OSError):  # then each entry says that it cannot be read
        recorded &= set(manifest.list_run_ids(run_root))
    for run in runs:
        if run.run_id not in recorded:
            continue
        with collect_unreadable() as unreadable:
            try:
                entry = manifest.find_done(run_root, run.run_id)
            except FormatVersionError as error:
                entry = None
                found.refused[run.run_id] = str(error)
        if entry is not None:
            found.done[run.run_id] = entry
        if unreadable:
            found.unreadable[run.run_id] = unreadable
    return found


def _find_status(
    run: StageRun,
    run_dir: Path,
    records: _Entries,
    names: Mapping[str, str],
    jobs: Mapping[str, Sequence[queue.QueuedJob]],
    silence: str,
) -> RunStatus:
    queued = jobs.get(run.run_id, [])
    # A job that can still run says more than one that cannot.
    queued = [job for job in queued if job.can_run] or queued
    if (entry := records.done.get(run.run_id)) is not None:
        return RunStatus(run, "done", _describe_cost(entry))
    if refusal := records.refused.get(run.run_id):
        return RunStatus(run, "blocked", refusal)
    if queued:
        return _status_in_queue(run, run_dir, queued[-1])
    if silence and (job_id := may_have_job(run_dir, run.run_id)):
        return _unknown(run, run_dir, job_id, silence)
    missing = [names.get(need, need) for need in run.needs.values() if need not in records.done]
    return _status_outside_queue(run, run_dir, missing)


def _add_remarks(status: RunStatus, owner: str | None, unreadable: Sequence[Path]) -> RunStatus:
    """Add to the detail whose the run is, if it is another user's, and what cannot be read."""
    if owner is None and not unreadable:
        return status
    detail = status.detail
    if owner is not None:
        detail = (
            f"{detail}, by {owner}" if status.state == "done" else f"begun by {owner}: {detail}"
        )
    if unreadable:
        detail += f"; unreadable: {', '.join(map(str, unreadable))}"
    return replace(status, detail=detail)


def _sum_cost(status: RunStatus, run_dir: Path, done: Mapping[str, manifest.ManifestEntry]) -> Cost:
    if (entry := done.get(status.run.run_id)) is not None:
        return Cost(entry.seconds, entry.gpu_hours)
    latest = attempts.latest_attempt(run_dir)
    if not latest:
        return Cost()
    # Attempts of earlier versions do not tell their GPUs; those of a cluster got what was asked.
    gpus = status.run.resources.gpus if (run_dir / queue.JOB_NOTE).exists() else 0
    return sum_attempts(run_dir, gpus=gpus, running=latest if status.state == "running" else None)


def _unknown(run: StageRun, run_dir: Path, job_id: str, silence: str) -> RunStatus:
    if attempts.is_running_here(run_dir):
        return _running(run, run_dir, job_id)
    detail = f"may be job {job_id}; Slurm did not tell: {silence}"
    if _is_fresh(run_dir):
        detail += f"; it still makes progress: {_describe_progress(run_dir)}"
    return RunStatus(run, "unknown", detail, job_id, find_newest_log(run_dir))


def exit_code(found: Sequence[RunStatus]) -> int:
    """Return 1 if a run failed or can never start, else 75 if Slurm did not tell of one, else 0."""
    states = {status.state for status in found}
    if states & {"failed", "blocked"}:
        return 1
    return EXIT_INTERRUPTED if "unknown" in states else 0


def watch_status(
    runs: Sequence[StageRun], run_root: Path, *, pause_s: float = 5.0
) -> Iterator[list[RunStatus]]:
    """Yield the status again and again, as long as a run is or may be running or queued."""
    while True:
        found = collect_status(runs, run_root)
        yield found
        # Of an unknown run, the next answer may tell.
        if not any(status.state in ("running", "queued", "unknown") for status in found):
            return
        time.sleep(pause_s)


def _describe_cost(entry: manifest.ManifestEntry) -> str:
    gpu = f", {entry.gpu_hours:.1f} GPU-hours" if entry.gpus else ""
    restarts = f", {format_count(entry.restarts, 'restart')}" if entry.restarts else ""
    return f"{format_duration(entry.seconds)}{gpu}{restarts}"


def _status_in_queue(run: StageRun, run_dir: Path, job: queue.QueuedJob) -> RunStatus:
    if job.state in _ACTIVE:
        return _running(run, run_dir, job.job_id)
    detail = f"{job.state.lower()}: {job.reason}"
    if job.is_held:
        detail += f", held: `scontrol release {job.job_id}` lets it start"
    if earlier := attempts.latest_attempt(run_dir):
        detail += f", {format_count(earlier, 'attempt')} before"
        if failure := attempts.read_failure(run_dir, earlier):
            detail += f", the last failed: {failure.error}"
    if job.reason == queue.NEVER_SATISFIED:
        # What it needs has failed and says so itself.
        return RunStatus(run, "waiting", f"{job.why_never}", job.job_id)
    if job.why_never:
        mended = nodes.lift_exclusion(job, run_dir, queue.call_scontrol)
        return RunStatus(
            run,
            "queued" if mended else "blocked",
            f"{detail}; {mended or job.why_never}",
            job.job_id,
        )
    return RunStatus(run, "queued", detail, job.job_id)


def _running(run: StageRun, run_dir: Path, job_id: str | None) -> RunStatus:
    progress = _describe_progress(run_dir)
    # Of the ranks at work, the first says most.
    log = find_newest_log(run_dir, "attempt_*_rank0.log") or find_newest_log(run_dir)
    return RunStatus(run, "running", progress, job_id, log)


def _status_outside_queue(run: StageRun, run_dir: Path, missing: Sequence[str]) -> RunStatus:
    """Return the status of a run that is neither done nor in the queue.

    `missing` names the inputs that are not done. The run is running on this machine, failed, or
    waiting to be started; or it is in a queue that did not answer.
    """
    number = attempts.latest_attempt(run_dir)
    attempt = attempts.read_attempt(run_dir, number)
    note = queue.read_job_note(run_dir)
    submitted_id = note.get("job_id")
    if missing:
        waits = f"needs {', '.join(missing)}"
    elif (run_dir / runfile.FILE_NAME).exists():
        waits = "not started, deferred: the keeper or the next submit queues it"
    else:
        waits = "not started"
    if number == 0 and submitted_id is None:
        return RunStatus(run, "waiting", waits)

    if submitted_id and _began_before(run_dir, number, attempt, submitted_id):
        # The newest job has left the queue without starting an attempt.
        if missing:
            return RunStatus(run, "waiting", waits, submitted_id)
        return _status_without_attempt(run, run_dir, submitted_id)

    job_id = attempt.get("job_id")
    try:
        job_state = queue.query_job_state(str(job_id)) if job_id else None
    except queue.SlurmError as error:
        if may_have_job(run_dir, run.run_id):
            return _unknown(run, run_dir, str(job_id), str(error))
        job_state = None
    if job_state in _NOT_OVER:
        # squeue did not answer, but scontrol or sacct did.
        detail = f"{job_state.lower()}, {format_count(number, 'attempt')} before"
        return RunStatus(run, "queued", detail, job_id)
    return _status_of_attempt(run, run_dir, number, job_id, job_state)


def _began_before(run_dir: Path, number: int, attempt: Mapping[str, Any], job_id: str) -> bool:
    """Return whether the newest attempt, if any, is older than the submission of a job."""
    if str(attempt.get("job_id")) == job_id:
        return False  # it is an attempt of that job
    # By the clock of the file server: the hosts that wrote the two may differ by a day.
    began = attempts.find_start_time(run_dir, number)
    return (run_dir / queue.JOB_NOTE).stat().st_mtime > began


def _status_without_attempt(run: StageRun, run_dir: Path, job_id: str) -> RunStatus:
    """Return the status of a run whose job has left the queue without starting an attempt."""
    if queue.is_canceled(run_dir, job_id):
        return RunStatus(run, "canceled", "by you, resumes when submitted again", job_id)
    try:
        state = queue.query_job_state(job_id) or "gone"
    except queue.SlurmError as error:
        return _unknown(run, run_dir, job_id, str(error))
    if state in _NOT_OVER:
        return RunStatus(run, "queued", state.lower(), job_id)
    if state == "CANCELLED":
        return RunStatus(run, "canceled", f"resumes when submitted again [job {state}]", job_id)
    if state in _TAKEN:
        return RunStatus(run, "waiting", f"resumes when submitted again [job {state}]", job_id)
    log = find_newest_log(run_dir, f"{job_id}_*")
    line = read_last_line(log) or "no output"
    return RunStatus(run, "failed", f"{line} [job {state}]", job_id, log)


def _status_of_attempt(
    run: StageRun, run_dir: Path, number: int, job_id: str | None, job_state: str | None
) -> RunStatus:
    """Return the status that follows from the newest attempt, whose job, if it had one, is over."""
    suffix = f" [job {job_state}]" if job_state else ""
    failure = attempts.read_failure(run_dir, number)
    if job_state in _TAKEN and not (failure and failure.no_retry_reason):
        return RunStatus(run, "waiting", f"resumes when submitted again{suffix}", job_id)
    if failure is not None:
        reason = f" ({failure.no_retry_reason})" if failure.no_retry_reason else ""
        log = find_log_of(run_dir, failure.log, job_id)
        return RunStatus(run, "failed", failure.error + reason + suffix, job_id, log)
    if attempts.is_running_here(run_dir) or (not job_id and _is_fresh(run_dir)):
        return _running(run, run_dir, None)
    by_user = job_id is not None and queue.is_canceled(run_dir, job_id)
    if by_user or job_state == "CANCELLED":
        why = attempts.read_interruption(run_dir, number)
        saved = f"stopped ({why}), " if why else ""
        detail = f"{saved}resumes when submitted again"
        # How Slurm saw the end of one says nothing: if it saved in time, it counts as failed there.
        detail = f"by you, {detail}" if by_user else f"{detail}{suffix}"
        return RunStatus(run, "canceled", detail, job_id)
    if (why := attempts.read_interruption(run_dir, number)) is not None:
        detail = f"interrupted ({why}), resumes when run or submitted again{suffix}"
        return RunStatus(run, "waiting", detail, job_id)
    detail = f"exited without recording an error{suffix}"
    return RunStatus(run, "failed", detail, job_id, find_newest_log(run_dir))


def find_log_of(run_dir: Path, log: str, job_id: str | None) -> str | None:
    """Return a log if it exists, else the output that Slurm or the local executor kept itself.

    An attempt that died before it could log anything leaves only that.
    """
    # The run root may have been moved since.
    places = (Path(log), run_dir / "logs" / Path(log).name) if log else ()
    with suppress(OSError):  # a name too long, or a folder of others
        for place in places:
            if place.is_file():
                return str(place)
    own = find_newest_log(run_dir, f"{job_id}_*") if job_id else None
    return own or find_newest_log(run_dir, "rank*.err")


def _is_fresh(run_dir: Path) -> bool:
    """Return whether an attempt, perhaps on another machine, made progress lately."""
    if not read_progress(run_dir):
        return False
    return measure_age(run_dir / FILE_NAME, run_dir.parents[1]) < _FRESH_S


def _describe_progress(run_dir: Path) -> str:
    path = run_dir / FILE_NAME
    note = read_progress(run_dir)
    began = attempts.find_start_time(run_dir, attempts.latest_attempt(run_dir))
    if not note or path.stat().st_mtime < began:
        return "starting"  # the file is of an earlier attempt
    phase = f"{note['phase']}: " if note.get("phase") else ""
    parts = [f"{phase}{note.get('done')}/{note.get('total')} {note.get('unit', 'steps')}"]
    if note.get("rate"):
        parts.append(f"{note['rate']:.4g} {note.get('rate_unit', 'img/s')}")
    if note.get("eta_s") is not None:
        parts.append(f"{format_duration(note['eta_s'])} left")
    age_s = measure_age(path, run_dir.parents[1])
    if age_s > _FRESH_S:
        parts.append(f"no news for {format_duration(age_s)}")
    return ", ".join(parts)


def format_duration(seconds: float) -> str:
    """Return seconds as `42s`, `3m05s`, `2h10m` or `1d04h`."""
    whole = max(0, round(seconds))
    if whole < 60:
        return f"{whole}s"
    if whole < 3600:
        return f"{whole // 60}m{whole % 60:02d}s"
    if whole < 86400:
        return f"{whole // 3600}h{whole % 3600 // 60:02d}m"
    return f"{whole // 86400}d{whole % 86400 // 3600:02d}h"


def format_json(
    found: Sequence[RunStatus], forecasts: Mapping[str, Any], no_forecasts: Mapping[str, str]
) -> str:
    """Return the status of runs as a JSON list, for programs.

    `forecasts` says, by the id of a run with a k-NN curve, how high and when the curve will end;
    `no_forecasts` why the others have none.
    """
    rows = [
        {
            "run": status.run.name,
            "run_id": status.run.run_id,
            "state": status.state,
            "detail": status.detail,
            "job_id": status.job_id,
            "log": status.log,
            "seconds": round(status.cost.seconds),
            "gpu_hours": round(status.cost.gpu_hours, 4),
            "forecast": forecasts.get(status.run.run_id),
            "no_forecast": no_forecasts.get(status.run.run_id),
        }
        for status in found
    ]
    return json.dumps(rows, indent=1)
