"""Cancel the jobs of runs: what runs may save first, and nothing starts again."""

import logging
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path

from pipeline.spec import StageRun
from slurm.shared import queue

logger = logging.getLogger(__name__)
_POLL_S = 2.0
_PATIENCE_S = 300.0  # longer than a step and a save of the largest bundled network


def cancel_runs(
    runs: Sequence[StageRun],
    run_root: Path,
    *,
    at_once: bool = False,
    on_wait: Callable[[Sequence[str]], None] = lambda job_ids: None,
    patience_s: float = _PATIENCE_S,
) -> list[str]:
    """Cancel the queued and running jobs of the runs; return the ids of these jobs.

    A running job is warned as before its time limit, so that it saves and ends by itself; what has
    not ended in `patience_s` is killed. `on_wait` is called with the ids of the jobs that may still
    save. With `at_once`, or on Ctrl-C, nothing is waited for.

    Raises:
        SlurmError: Slurm does not answer, or refuses.
    """
    jobs = queue.find_jobs(runs, run_root)
    found = [(run, job) for run in runs for job in jobs.get(run.run_id, [])]
    for run, job in found:
        # First of all: a job that is warned would otherwise go back into the queue.
        try:
            queue.record_cancel(run.run_dir(run_root), job.job_id)
        except OSError as error:
            logger.warning("job %s may be started again once: %s", job.job_id, error)
    running = [job.job_id for _, job in found if job.state == "RUNNING"]
    others = [job.job_id for _, job in found if job.job_id not in running]
    # What waits goes first, so that it does not start when the others end.
    queue.cancel_jobs(others)
    if running and not at_once:
        queue.warn_jobs(running)
        on_wait(running)
        with suppress(KeyboardInterrupt):  # the user does not want to wait
            _wait_for_end(runs, run_root, running, patience_s)
    queue.cancel_jobs(running)
    return [job.job_id for _, job in found]


def _wait_for_end(
    runs: Sequence[StageRun], run_root: Path, job_ids: Sequence[str], patience_s: float
) -> None:
    """Wait until these jobs have left the queue, at most `patience_s`."""
    end = time.monotonic() + patience_s
    while time.monotonic() < end:
        left = queue.find_jobs(runs, run_root).values()
        if not any(job.job_id in job_ids for group in left for job in group):
            return
        time.sleep(_POLL_S)
