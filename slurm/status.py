"""State of every run, and which run folders are in use.

Both follow from the manifest, the attempts, the progress file and the queue.
"""

import json
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from pipeline import attempts, manifest
from pipeline.files import read_json
from pipeline.spec import StageRun
from slurm.shared import queue
from slurm.shared.logs import find_newest_log, read_last_line

_FRESH_S = 180.0  # progress is written more often than that
_ACTIVE = ("RUNNING", "COMPLETING", "SUSPENDED", "STOPPED", "SIGNALING", "STAGE_OUT")
_NOT_OVER = (*_ACTIVE, "PENDING", "CONFIGURING", "REQUEUED")


@dataclass(frozen=True)
class RunStatus:
    """State of one run: done | running | queued | failed | waiting, and details of it."""

    run: StageRun
    state: str
    detail: str = ""
    job_id: str | None = None
    log: str | None = None


def collect_status(runs: Sequence[StageRun], run_root: Path) -> list[RunStatus]:
    """Return the status of the runs, in the given order; works with and without Slurm."""
    # The queue is asked first: a job that ends in between is then found done, not missing.
    jobs = queue.find_jobs(runs, run_root)
    done = manifest.split_runs(run_root, runs).done
    names = {run.run_id: run.name for run in runs}
    found = []
    for run in runs:
        entry = done.get(run.run_id)
        alive = [job for job in jobs.get(run.run_id, []) if job.can_run]
        if entry is not None:
            found.append(RunStatus(run, "done", _describe_cost(entry)))
        elif alive:
            found.append(_status_in_queue(run, run.run_dir(run_root), alive[-1]))
        else:
            missing = [names.get(need, need) for need in run.needs.values() if need not in done]
            found.append(_status_outside_queue(run, run.run_dir(run_root), missing))
    return found


def watch_status(
    runs: Sequence[StageRun], run_root: Path, *, pause_s: float = 5.0
) -> Iterator[list[RunStatus]]:
    """Yield the status again and again, as long as a run is running or queued."""
    while True:
        found = collect_status(runs, run_root)
        yield found
        if not any(status.state in ("running", "queued") for status in found):
            return
        time.sleep(pause_s)


def _describe_cost(entry: manifest.ManifestEntry) -> str:
    gpu = f", {entry.gpu_hours:.1f} GPU-hours" if entry.gpus else ""
    restarts = f", {entry.restarts} restarts" if entry.restarts else ""
    return f"{format_duration(entry.seconds)}{gpu}{restarts}"


def _status_in_queue(run: StageRun, run_dir: Path, job: queue.QueuedJob) -> RunStatus:
    if job.state in _ACTIVE:
        return _running(run, run_dir, job.job_id)
    detail = f"{job.state.lower()}: {job.reason}"
    if earlier := attempts.latest_attempt(run_dir):
        detail += f", {earlier} attempts before"
    if failure := attempts.read_failure(run_dir):
        detail += f", the last failed: {failure.error}"
    return RunStatus(run, "queued", detail, job.job_id)


def _running(run: StageRun, run_dir: Path, job_id: str | None) -> RunStatus:
    progress = _describe_progress(run_dir)
    return RunStatus(run, "running", progress, job_id, find_newest_log(run_dir))


def _status_outside_queue(run: StageRun, run_dir: Path, missing: Sequence[str]) -> RunStatus:
    """Return the status of a run that is neither done nor in the queue.

    `missing` names the inputs that are not done. The run is running on this machine, failed, or
    waiting to be started; or it is in a queue that did not answer.
    """
    number = attempts.latest_attempt(run_dir)
    attempt = attempts.read_attempt(run_dir, number)
    note = read_json(run_dir / queue.JOB_NOTE) or {}
    submitted_id = str(note["job_id"]) if "job_id" in note else None
    waits = f"needs {', '.join(missing)}" if missing else "not started"
    if number == 0 and submitted_id is None:
        return RunStatus(run, "waiting", waits)

    if submitted_id and float(note.get("time", 0.0)) > float(attempt.get("time", 0.0)):
        # The newest job has left the queue without starting an attempt.
        if missing:
            return RunStatus(run, "waiting", waits, submitted_id)
        state = queue.query_job_state(submitted_id) or "gone"
        log = find_newest_log(run_dir, f"{submitted_id}_*")
        line = read_last_line(log) or "no output"
        return RunStatus(run, "failed", f"{line} [job {state}]", submitted_id, log)

    job_id = attempt.get("job_id")
    job_state = queue.query_job_state(str(job_id)) if job_id else None
    if job_state in _NOT_OVER:
        # squeue did not answer, but scontrol or sacct did.
        return RunStatus(run, "queued", f"{job_state.lower()}, {number} attempts before", job_id)
    return _status_of_attempt(run, run_dir, number, job_id, job_state)


def _status_of_attempt(
    run: StageRun, run_dir: Path, number: int, job_id: str | None, job_state: str | None
) -> RunStatus:
    """Return the status that follows from the newest attempt, whose job, if it had one, is over."""
    suffix = f" [job {job_state}]" if job_state else ""
    failure = attempts.read_failure(run_dir, number)
    if failure is not None:
        reason = f" ({failure.no_retry_reason})" if failure.no_retry_reason else ""
        return RunStatus(run, "failed", failure.error + reason + suffix, job_id, failure.log)
    if attempts.is_running_here(run_dir) or (not job_id and _is_fresh(run_dir)):
        return _running(run, run_dir, None)
    if (why := attempts.read_interruption(run_dir, number)) is not None:
        detail = f"interrupted ({why}), resumes when run or submitted again{suffix}"
        return RunStatus(run, "waiting", detail, job_id)
    detail = f"exited without recording an error{suffix}"
    return RunStatus(run, "failed", detail, job_id, find_newest_log(run_dir))


def _is_fresh(run_dir: Path) -> bool:
    """Return whether an attempt, perhaps on another machine, made progress lately."""
    written = float((read_json(run_dir / "progress.json") or {}).get("time", 0.0))
    return time.time() - written < _FRESH_S


def _describe_progress(run_dir: Path) -> str:
    note = read_json(run_dir / "progress.json") or {}
    written = float(note.get("time", 0.0))
    attempt = attempts.read_attempt(run_dir, attempts.latest_attempt(run_dir))
    if not note or written < float(attempt.get("time", 0.0)):
        return "starting"  # the file is of an earlier attempt
    phase = f"{note['phase']}: " if note.get("phase") else ""
    parts = [f"{phase}{note.get('done')}/{note.get('total')} {note.get('unit', 'steps')}"]
    if note.get("rate"):
        parts.append(f"{float(note['rate']):.4g} {note.get('rate_unit', 'img/s')}")
    if note.get("eta_s") is not None:
        parts.append(f"{format_duration(float(note['eta_s']))} left")
    age_s = time.time() - written
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


def format_json(found: Sequence[RunStatus]) -> str:
    """Return the status of runs as a JSON list, for programs."""
    rows = [
        {
            "run": status.run.name,
            "run_id": status.run.run_id,
            "state": status.state,
            "detail": status.detail,
            "job_id": status.job_id,
            "log": status.log,
        }
        for status in found
    ]
    return json.dumps(rows, indent=1)


def find_active_runs(folders: Mapping[Path, str]) -> dict[Path, str]:
    """Return which of these run folders, given with their run ids, are in use, and how.

    Slurm is asked only about runs that were submitted and whose own records do not say that they
    are over. If it does not answer, these count as in use.
    """
    uncertain = {
        folder: job_id
        for folder, run_id in folders.items()
        if (job_id := _last_job_id(folder)) and not _is_over(folder, run_id, job_id)
    }
    silence = ""
    try:
        jobs = queue.find_jobs_by_run_id(folders[folder] for folder in uncertain)
    except queue.SlurmError as error:
        jobs = {}
        silence = str(error)

    active = {}
    for folder, run_id in folders.items():
        if run_id in jobs:
            active[folder] = f"is job {jobs[run_id].job_id}, {jobs[run_id].state}"
        elif attempts.is_running_here(folder):
            active[folder] = "is running on this machine"
        elif folder in uncertain and silence:
            active[folder] = f"may be job {uncertain[folder]} of a cluster: {silence}"
    return active


def _last_job_id(folder: Path) -> str | None:
    """Return the job id of the run's last submission; None if it was never submitted.

    The id is `?` if that submission died before it recorded one. The batch script is written before
    sbatch is called and the job id after it, so a script newer than the id tells of that.
    """
    script = folder / queue.SCRIPT
    note = folder / queue.JOB_NOTE
    noted = note.exists()
    if script.exists() and not (noted and note.stat().st_mtime >= script.stat().st_mtime):
        return "?"
    return str((read_json(note) or {}).get("job_id", "?")) if noted else None


def _is_over(folder: Path, run_id: str, job_id: str) -> bool:
    """Return whether the records say that no job is left: the run is done, or is not retried."""
    if manifest.find_done(folder.parents[1], run_id):
        return True
    failure = attempts.read_failure(folder)
    return (
        failure is not None
        and failure.no_retry_reason != ""
        # A later job may have been queued since that failure.
        and attempts.read_attempt(folder, failure.attempt).get("job_id") == job_id
    )
