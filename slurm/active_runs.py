"""Which run folders are in use: queued, running on the cluster, or running on this machine."""

from collections.abc import Mapping
from pathlib import Path

from pipeline import attempts, manifest
from pipeline.files import read_json
from slurm.shared import queue


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
    jobs: Mapping[str, queue.QueuedJob] = {}
    silence = ""
    try:
        jobs = queue.find_jobs_by_run_id(folders[folder] for folder in uncertain)
    except queue.SlurmError as error:
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
    if manifest.find_done(folder.parents[1], run_id) is not None:
        return True
    failure = attempts.read_failure(folder)
    if failure is None or not failure.no_retry_reason:
        return False
    # A later job may have been queued since that failure.
    return attempts.read_attempt(folder, failure.attempt).get("job_id") == job_id
