"""State of every run, joined from the manifest, the attempts, the progress file and the queue."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pipeline import attempts, manifest
from pipeline.files import read_json
from pipeline.spec import StageRun
from slurm.shared import queue
from slurm.shared.logs import find_newest_log, read_last_line

_FRESH_S = 180.0
_ACTIVE = ("RUNNING", "COMPLETING", "SUSPENDED", "STOPPED", "SIGNALING", "STAGE_OUT")
_NOT_OVER = (*_ACTIVE, "PENDING", "CONFIGURING", "REQUEUED")  # where squeue did not answer


@dataclass(frozen=True)
class RunStatus:
    """State of one run: done | running | queued | failed | waiting, and what is worth saying about it."""

    run: StageRun
    state: str
    detail: str = ""
    job_id: str | None = None
    log: str | None = None


def collect_status(runs: Sequence[StageRun], run_root: Path) -> list[RunStatus]:
    """Status of the runs, in the given order; works with and without Slurm."""
    jobs = queue.find_jobs(runs, run_root)
    done = manifest.split_runs(run_root, runs).done
    names = {run.run_id: run.name for run in runs}
    found = []
    for run in runs:
        if (entry := done.get(run.run_id)) is not None:
            found.append(RunStatus(run, "done", _cost(entry)))
            continue
        mine = [job for job in jobs.get(run.run_id, []) if job.can_run]
        missing = [names.get(need, need) for need in run.needs.values() if need not in done]
        if mine:
            found.append(_queued(run, run.run_dir(run_root), mine[-1]))
        else:
            found.append(_unqueued(run, run.run_dir(run_root), missing))
    return found


def watch_status(
    runs: Sequence[StageRun], run_root: Path, *, pause_s: float = 5.0
) -> Iterator[list[RunStatus]]:
    """The status again and again, as long as a run is running or queued."""
    while True:
        found = collect_status(runs, run_root)
        yield found
        if not any(s.state in ("running", "queued") for s in found):
            return
        time.sleep(pause_s)


def _cost(entry: manifest.ManifestEntry) -> str:
    restarts = f", {entry.restarts} restarts" if entry.restarts else ""
    gpu = f", {entry.gpu_hours:.1f} GPU-hours" if entry.gpus else ""
    return f"{format_duration(entry.seconds)}{gpu}{restarts}"


def _queued(run: StageRun, run_dir: Path, job: queue.QueuedJob) -> RunStatus:
    if job.state in _ACTIVE:
        return RunStatus(run, "running", _progress(run_dir), job.job_id, find_newest_log(run_dir))
    restarts = attempts.latest_attempt(run_dir)
    again = f", {restarts} attempts before" if restarts else ""
    failure = attempts.read_failure(run_dir)
    why = f", the last failed: {failure.error}" if failure else ""
    return RunStatus(run, "queued", f"{job.state.lower()}: {job.reason}{again}{why}", job.job_id)


def _unqueued(run: StageRun, run_dir: Path, missing: Sequence[str]) -> RunStatus:
    """A run that is neither done nor in the queue: running here, failed, or waiting to be started."""
    number = attempts.latest_attempt(run_dir)
    begun = attempts.read_attempt(run_dir, number)
    started, of_slurm = float(begun.get("time", 0.0)), begun.get("job_id")
    note: Mapping[str, Any] = read_json(run_dir / queue.JOB_NOTE) or {}
    job_id = str(note["job_id"]) if "job_id" in note else None
    submitted = float(note.get("time", 0.0))
    waits = f"needs {', '.join(missing)}" if missing else "not started"
    if number == 0 and job_id is None:
        return RunStatus(run, "waiting", waits)
    if job_id is not None and submitted > started:
        if missing:
            return RunStatus(run, "waiting", waits, job_id)
        state = queue.query_job_state(job_id) or "gone"
        log = find_newest_log(run_dir, f"{job_id}_*")
        return RunStatus(
            run, "failed", f"{read_last_line(log) or 'no output'} [job {state}]", job_id, log
        )
    known = queue.query_job_state(str(of_slurm)) if of_slurm else None
    if known in _NOT_OVER:
        return RunStatus(run, "queued", f"{known.lower()}, {number} attempts before", of_slurm)
    failure = attempts.read_failure(run_dir, number)
    if failure is None and (
        attempts.is_running_here(run_dir) or (not of_slurm and _fresh(run_dir))
    ):
        return RunStatus(run, "running", _progress(run_dir), None, find_newest_log(run_dir))
    suffix = f" [job {known}]" if known else ""
    if failure is None and (why := attempts.read_interruption(run_dir, number)) is not None:
        return RunStatus(
            run,
            "waiting",
            f"interrupted ({why}), goes on when run or submitted again{suffix}",
            of_slurm,
        )
    if failure is not None:
        verdict = f" ({failure.no_retry_reason})" if failure.no_retry_reason else ""
        return RunStatus(run, "failed", failure.error + verdict + suffix, of_slurm, failure.log)
    return RunStatus(
        run, "failed", f"stopped without a word{suffix}", of_slurm, find_newest_log(run_dir)
    )


def _fresh(run_dir: Path) -> bool:
    """Whether an attempt on another machine has shown life lately."""
    note = read_json(run_dir / "progress.json") or {}
    return time.time() - float(note.get("time", 0.0)) < _FRESH_S


def _progress(run_dir: Path) -> str:
    note = read_json(run_dir / "progress.json")
    start = attempts.read_attempt(run_dir, attempts.latest_attempt(run_dir)).get("time", 0.0)
    if note is None or float(note.get("time", 0.0)) < float(start):
        return "starting"
    parts = [f"{note.get('done')}/{note.get('total')} {note.get('unit', 'steps')}"]
    if note.get("rate"):
        parts.append(f"{float(note['rate']):.4g} {note.get('rate_unit', 'img/s')}")
    if note.get("eta_s") is not None:
        parts.append(f"{format_duration(float(note['eta_s']))} left")
    age = time.time() - float(note.get("time", 0.0))
    if age > _FRESH_S:
        parts.append(f"no news for {format_duration(age)}")
    return ", ".join(parts)


def format_duration(seconds: float) -> str:
    """Seconds as `42s`, `3m05s`, `2h10m` or `1d04h`."""
    whole = max(0, round(seconds))
    if whole < 60:
        return f"{whole}s"
    if whole < 3600:
        return f"{whole // 60}m{whole % 60:02d}s"
    if whole < 86400:
        return f"{whole // 3600}h{whole % 3600 // 60:02d}m"
    return f"{whole // 86400}d{whole % 86400 // 3600:02d}h"


def format_json(found: Sequence[RunStatus]) -> str:
    """The same for programs: a JSON list."""
    keys = ("state", "detail", "job_id", "log")
    rows = [
        {"run": s.run.name, "run_id": s.run.run_id, **{k: getattr(s, k) for k in keys}}
        for s in found
    ]
    return json.dumps(rows, indent=1)
