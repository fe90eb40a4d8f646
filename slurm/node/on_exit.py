"""What becomes of a job after srun ended with an error: queued again, or stopped with the reason.

`python -m slurm.node.on_exit RUN_DIR EXIT_CODE` is the end of every batch script. It also speaks for ranks that could not:
killed, out of memory, dead before they began. A job that was asked to stop is queued again, if rank 0 has not done so.
"""

from __future__ import annotations

import logging
import os
import signal
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from pipeline import attempts, manifest, runfile
from pipeline.files import read_json
from slurm.node.job import EXIT_HUNG, EXIT_INTERRUPTED
from slurm.node.requeue import RequeueError, exclude_node, requeue_job
from slurm.shared.logs import log_path

logger = logging.getLogger("slurm.node.on_exit")
_ASKED_TO_STOP = (EXIT_INTERRUPTED, 128 + signal.SIGUSR2, 128 + signal.SIGTERM)


def handle_srun_exit(run_dir: Path, code: int) -> int:
    """Requeue the job of this process, or leave it ended; notes why. Returns the exit code of the job.

    A run that is done has ended well, whatever ended its processes after that: a late warning, a crash at their exit.
    """
    job_id, restart = os.environ["SLURM_JOB_ID"], int(os.environ.get("SLURM_RESTART_COUNT", "0"))
    if manifest.find_done(run_dir.parents[1], runfile.read(run_dir).run_id) is not None:
        return 0
    attempt = _attempt(run_dir, job_id, restart)
    if attempt is None:
        logger.warning(
            "a newer attempt of %s has started, job %s leaves it alone", run_dir.name, job_id
        )
        return code
    if code in _ASKED_TO_STOP:
        requeue_job(job_id)
        return code
    _note(run_dir, attempt, code)
    failures = _failures(run_dir, job_id)
    if (reason := why_not_retry(failures, _limit(run_dir))) is not None:
        logger.error("%s is not started again: %s", run_dir.name, reason)
        attempts.record_no_retry(run_dir, attempt, reason)
        return code
    last = failures[-1]
    logger.warning("%s failed (%s): starts again", run_dir.name, last.error)
    if requeue_job(job_id) and last.host:
        exclude_node(job_id, last.host)
    return code


def why_not_retry(failures: Sequence[attempts.Failure], limit: int) -> str | None:
    """Why a job with these failures, oldest first, should not be started again; None when it should."""
    last = failures[-1]
    if last.repeatable:
        return "the same would happen again"
    if len(failures) > 1 and failures[-2].step == last.step:
        return f"failed twice {'before the first step' if last.step is None else f'after step {last.step}'}"
    return f"{len(failures)} attempts failed" if len(failures) >= limit else None


def _attempt(run_dir: Path, job_id: str, restart: int) -> int | None:
    """Number of this start's attempt, taken now where nobody came that far; None when there is a newer one."""
    number = attempts.latest_attempt(run_dir)
    note = attempts.read_attempt(run_dir, number)
    launch = str(note.get("launch", ""))
    if launch == f"slurm-{job_id}-{restart}":
        return number
    if launch.startswith("slurm-"):
        _, job, count = launch.split("-")
        if (int(job.split("_")[0]), int(count)) > (int(job_id), restart):
            return None
    return attempts.start_attempt(run_dir, launch=f"slurm-{job_id}-{restart}", job_id=job_id)


def _note(run_dir: Path, attempt: int, code: int) -> None:
    """A failure record for an attempt that left none."""
    if code > 128:
        how = f"was killed by {signal.Signals(code - 128).name}"
    else:
        how = "hung" if code == EXIT_HUNG else f"ended with exit code {code}"
    nodes = os.environ.get("SLURM_JOB_NODELIST", "")
    alone = nodes if os.environ.get("SLURM_JOB_NUM_NODES") == "1" else None
    step, log = _last_step(run_dir, attempt), log_path(run_dir, attempt, 0)
    attempts.record_failure(
        run_dir, attempt, error=f"a rank {how}, on {nodes}", log=log, step=step, host=alone
    )


def _last_step(run_dir: Path, attempt: int) -> int | None:
    """The last step that the attempt told of."""
    began = float(attempts.read_attempt(run_dir, attempt).get("time", time.time()))
    progress = read_json(run_dir / "progress.json") or {}
    told = float(progress.get("time", 0.0)) > began and progress.get("unit") == "steps"
    return int(progress["done"]) if told else None


def _failures(run_dir: Path, job_id: str) -> list[attempts.Failure]:
    """Failures of this job's attempts, oldest first: a new submission starts to count anew."""
    mine = [
        n
        for n in attempts.list_attempts(run_dir)
        if attempts.read_attempt(run_dir, n).get("job_id") == job_id
    ]
    return [failure for n in mine if (failure := attempts.read_failure(run_dir, n)) is not None]


def _limit(run_dir: Path) -> int:
    return int(runfile.read(run_dir).resources.get("max_failures", 3))


def main(arguments: list[str]) -> int:
    """Command line: `RUN_DIR EXIT_CODE`; returns the exit code of the job."""
    run_dir, code = Path(arguments[0]), int(arguments[1])
    signal.signal(
        signal.SIGTERM, signal.SIG_IGN
    )  # the requeue brings it, and the exclusion comes after that
    logging.basicConfig(
        level=logging.INFO, format="%(asctime)s %(levelname)s %(name)s: %(message)s"
    )
    try:
        return handle_srun_exit(run_dir, code)
    except RequeueError as error:
        logger.error("%s", error)
        return code


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
