"""Which run folders are in use: queued, running on the cluster, or running here."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path

from pipeline import attempts, manifest
from pipeline.files import read_json
from slurm.shared import queue


def find_active_runs(folders: Mapping[Path, str]) -> dict[Path, str]:
    """Of run folders with their run ids those in use, and how.

    The queue is asked about runs that were submitted and whose own records do not say that they are over; where it
    gives no answer, these count as in use. A run that was never submitted is in no queue.
    """
    submitted = {folder: job for folder in folders if (job := _last_job(folder)) is not None}
    in_doubt = {
        folder: job for folder, job in submitted.items() if not _over(folder, folders[folder], job)
    }
    jobs, silence = _ask(folders[folder] for folder in in_doubt)
    found = {}
    for folder, run_id in folders.items():
        if run_id in jobs:
            found[folder] = f"is job {jobs[run_id].job_id}, {jobs[run_id].state}"
        elif attempts.is_running_here(folder):
            found[folder] = "is running on this machine"
        elif folder in in_doubt and silence:
            found[folder] = f"may be job {in_doubt[folder]} of a cluster: {silence}"
    return found


def _last_job(folder: Path) -> str | None:
    """Id of the job that a run was last submitted as, `?` where the submission died before it noted one.

    None when it was never submitted: the script is written before sbatch is called.
    """
    script, note = folder / queue.SCRIPT, folder / queue.JOB_NOTE
    if script.exists() and not (note.exists() and note.stat().st_mtime >= script.stat().st_mtime):
        return "?"
    return str((read_json(note) or {}).get("job_id", "?")) if note.exists() else None


def _over(folder: Path, run_id: str, job: str) -> bool:
    """Whether the records say that no job is left: the run is done, or that job was its last and was given up."""
    if manifest.find_done(folder.parents[1], run_id) is not None:
        return True
    failure = attempts.read_failure(folder)
    if failure is None or not failure.no_retry_reason:
        return False
    return attempts.read_attempt(folder, failure.attempt).get("job_id") == job


def _ask(run_ids: Iterable[str]) -> tuple[dict[str, queue.QueuedJob], str]:
    """Jobs of these runs in the queue, and why it cannot be asked where that is so."""
    try:
        return queue.find_jobs_by_run_id(run_ids), ""
    except queue.SlurmError as error:
        return {}, str(error)
