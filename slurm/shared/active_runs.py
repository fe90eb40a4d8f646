"""Which runs have or may have a job, or processes here: those must not be started or removed."""

import os
from collections.abc import Mapping, Sequence
from pathlib import Path

from pipeline import attempts, manifest
from pipeline.files import CLOSED_FOLDER, collect_unreadable
from pipeline.spec import StageRun
from slurm.shared import queue


def ask_for_jobs(
    runs: Sequence[StageRun], run_root: Path
) -> tuple[dict[str, list[queue.QueuedJob]], str]:
    """Return the jobs of runs by run id, and why Slurm did not answer; "" if it did.

    Slurm is not asked about runs that were never submitted.
    """
    submitted = [run for run in runs if _was_submitted(run.run_dir(run_root))]
    try:
        return queue.find_jobs(submitted, run_root), ""
    except queue.SlurmError as error:
        return {}, str(error)


def may_have_job(run_dir: Path, run_id: str) -> str | None:
    """Return the id of a job that the run may still have by its own records; None if it has none.

    To be asked if Slurm does not answer. The id is `?` if it was never recorded.
    """
    job_id = _last_job_id(run_dir)
    if job_id is None or queue.is_canceled(run_dir, job_id):
        return None
    if _is_over(run_dir, job_id, done=bool(manifest.find_done(run_dir.parents[1], run_id))):
        return None
    return job_id


def find_active_runs(folders: Mapping[Path, str]) -> dict[Path, str]:
    """Return which of these run folders, given with their run ids, are in use, and how.

    Slurm is asked only about runs that were submitted and are not done. If it does not answer,
    these count as in use, unless their own records say that they are over.
    """
    roots = {_find_run_root(folder) for folder in folders}
    # One listing of entries, since most of thousands of runs may have none.
    recorded = {root: set(manifest.list_run_ids(Path(root))) for root in roots}
    active = {}
    with collect_unreadable():  # what cannot be read does not say that a run is over
        submitted = {
            folder
            for folder, run_id in folders.items()
            if _was_submitted(folder) and not _is_done(folder, run_id, recorded)
        }
        # First, as the records of thousands of runs that have a job need not be read then.
        silence = ""
        try:
            jobs = queue.find_jobs_of_folders(submitted)
        except queue.SlurmError as error:
            jobs = {}
            silence = str(error)

        for folder in folders:
            if folder in jobs:
                active[folder] = f"is job {jobs[folder].job_id}, {jobs[folder].state}"
            elif attempts.is_running_here(folder):
                active[folder] = "is running on this machine"
            elif silence and folder in submitted:
                job_id = _last_job_id(folder)
                if job_id is not None and not _is_over(folder, job_id, done=False):
                    active[folder] = f"may be job {job_id} of a cluster: {silence}"
    return active


def _is_done(folder: Path, run_id: str, recorded: Mapping[str, set[str]]) -> bool:
    root = _find_run_root(folder)
    return run_id in recorded[root] and manifest.find_done(Path(root), run_id) is not None


def _find_run_root(folder: Path) -> str:
    # As text: this is asked of each of thousands of runs.
    return os.path.dirname(os.path.dirname(folder))


def _was_submitted(folder: Path) -> bool:
    """Return whether `_last_job_id` returns one, without reading it."""
    try:
        return any(
            _changed(f"{folder}/{name}") is not None for name in (queue.SCRIPT, queue.JOB_NOTE)
        )
    except OSError as error:
        if error.errno not in CLOSED_FOLDER:
            raise
        return True


def _last_job_id(folder: Path) -> str | None:
    """Return the job id of the run's last submission; None if it was never submitted.

    The id is `?` if that submission died before it recorded one. The batch script is written before
    sbatch is called and the job id after it, so a script newer than the id tells of that. It is `?`
    too if we may not look into the folder, or it is no folder.
    """
    try:
        submitted = _changed(f"{folder}/{queue.SCRIPT}")
        noted = _changed(f"{folder}/{queue.JOB_NOTE}")
    except OSError as error:
        if error.errno not in CLOSED_FOLDER:
            raise
        return "?"
    if submitted is not None and (noted is None or noted < submitted):
        return "?"
    if noted is None:
        return None
    return queue.read_job_note(folder).get("job_id") or "?"


def _changed(path: str) -> int | None:
    """Return when a file was written; None if there is none."""
    # As text: this is asked of each of thousands of runs.
    try:
        return os.lstat(path).st_mtime_ns
    except FileNotFoundError:
        return None


def _is_over(folder: Path, job_id: str, *, done: bool) -> bool:
    """Return whether the records say that no job is left: the run is done, or is not retried."""
    if done:
        return True
    failure = attempts.read_failure(folder)
    return (
        failure is not None
        and failure.no_retry_reason != ""
        # A later job may have been queued since that failure.
        and attempts.read_attempt(folder, failure.attempt).get("job_id") == job_id
    )
