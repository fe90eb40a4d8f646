"""Decide what happens to a job after srun has ended with an error: requeue it, or leave it ended.

`python -m slurm.node.on_exit RUN_DIR EXIT_CODE` is the last command of every batch script. It also
records failures for ranks that could not do so themselves: killed, out of memory, or dead before
they began. A job that was asked to stop is requeued here if rank 0 has not done it.

Exit codes: 0 the run is done, 76 the batch script has to requeue the job because there is no
`scontrol` here, else the code of srun.
"""

import logging
import os
import signal
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from pipeline import attempts, manifest, runfile
from pipeline.ownership import keep_others_from_writing
from slurm.node.rendezvous import launch_key
from slurm.node.requeue import (
    NoScontrolError,
    RequeueError,
    exclude_node,
    read_job,
    requeue_job,
)
from slurm.node.time_limit import why_not_resume
from slurm.shared import queue
from slurm.shared.exit_codes import EXIT_HUNG, EXIT_INTERRUPTED, EXIT_REQUEUE_ME
from slurm.shared.logs import log_path
from slurm.shared.progress import read_progress

logger = logging.getLogger("slurm.node.on_exit")  # `__name__` is "__main__" under `python -m`
# Codes of a shell for a program that it cannot start.
_NOT_STARTED = {126: "is not allowed to start", 127: "could not start: no such program"}
# Errors that another node would not cure, in lower case: a port or the shared disk is full, or the
# rank only noticed that another one had died.
_NOT_OF_THE_NODE = (
    "address already in use",
    "eaddrinuse",
    "no space left on device",
    "disk quota exceeded",
    "connection closed by peer",
    "connection reset by peer",
    "took no number in",
)
# A shell reports a process that a signal ended as 128 + the number of the signal.
_ASKED_TO_STOP = (EXIT_INTERRUPTED, 128 + signal.SIGUSR2, 128 + signal.SIGTERM)


def handle_srun_exit(run_dir: Path, code: int) -> int:
    """Requeue the job of this process, or leave it ended and record why.

    Returns the exit code of the job. A run that is done counts as a success, whatever ended its
    processes after that: a late warning, or a crash while they exit.
    """
    job_id = os.environ["SLURM_JOB_ID"]
    restart = int(os.environ.get("SLURM_RESTART_COUNT", "0"))
    run_file = runfile.read_run_file(run_dir)
    if manifest.find_done(run_dir.parents[1], run_file.run_id) is not None:
        return 0
    attempt = _find_or_start_attempt(run_dir, job_id, restart)
    if attempt is None:
        logger.warning(
            "a newer attempt of %s has started: job %s is not requeued", run_dir.name, job_id
        )
        return code
    if code in _ASKED_TO_STOP or _was_warned(run_dir, attempt):
        _resume_later(run_dir, attempt, job_id)
        return code

    _record_silent_failure(run_dir, attempt, code)
    failures = _list_failures(run_dir, job_id)
    limit = int(run_file.resources.get("max_failures", 3))
    if reason := why_not_retry(failures, limit):
        logger.error("%s is not retried: %s", run_dir.name, reason)
        attempts.record_no_retry(run_dir, attempt, reason)
        return code
    last = failures[-1]
    logger.warning("%s failed (%s): retry", run_dir.name, last.error)
    # In this order, because Slurm excludes nodes only from a pending job.
    if requeue_job(job_id) and last.host and may_be_the_nodes(last.error):
        exclude_node(job_id, last.host)
    return code


def _resume_later(run_dir: Path, attempt: int, job_id: str) -> None:
    """Requeue a job that was asked to stop, unless it was canceled or would stop there again."""
    if queue.is_canceled(run_dir, job_id):
        logger.info("%s was canceled: job %s is not requeued", run_dir.name, job_id)
        return
    job, _ = read_job(job_id)
    if reason := why_not_resume(run_dir, attempt, job):
        logger.error("%s is not started again: %s", run_dir.name, reason)
        log = log_path(run_dir, attempt, 0)
        attempts.record_failure(run_dir, attempt, error="stopped at its time limit", log=log)
        attempts.record_no_retry(run_dir, attempt, reason)
        return
    requeue_job(job_id)


def may_be_the_nodes(error: str) -> bool:
    """Return whether the node may be the cause of an error, so that another one might cure it."""
    return not any(words in error.lower() for words in _NOT_OF_THE_NODE)


def describe_exit_code(code: int) -> str:
    """Return how a rank ended, for any exit code: `was killed by SIGKILL`."""
    if code == EXIT_HUNG:
        return "hung"
    if code in _NOT_STARTED:
        return f"{_NOT_STARTED[code]} (exit code {code})"
    # Not every number above 128 is that of a signal: programs may end with any code up to 255.
    if code - 128 in set(signal.Signals):
        return f"was killed by {signal.Signals(code - 128).name}"
    return f"ended with exit code {code}"


def _was_warned(run_dir: Path, attempt: int) -> bool:
    """Return whether the attempt stopped because Slurm warned it, and nothing failed.

    srun returns the highest code of all ranks, so one that was killed while it waited for the end
    hides that rank 0 was only interrupted. An interruption by SIGTERM proves nothing: srun sends it
    too, when another rank has died.
    """
    reason = attempts.read_interruption(run_dir, attempt) or ""
    return (
        reason.startswith(signal.SIGUSR2.name) and attempts.read_failure(run_dir, attempt) is None
    )


def why_not_retry(failures: Sequence[attempts.Failure], limit: int) -> str | None:
    """Return why a job with these failures, oldest first, is not retried; None if it is."""
    last = failures[-1]
    if last.repeatable:
        return "the error is in the code or configuration, so it would happen again"
    if len(failures) > 1 and failures[-2].step == last.step:
        # No progress between two failures: a third attempt would most likely fail at the same
        # place.
        where = "before the first step" if last.step is None else f"after step {last.step}"
        return f"failed twice {where}"
    return f"{len(failures)} attempts failed" if len(failures) >= limit else None


def _find_or_start_attempt(run_dir: Path, job_id: str, restart: int) -> int | None:
    """Return the attempt number of this job start.

    Starts an attempt if no rank got that far. Returns None if a newer attempt exists, of a later
    start of this job or of a later job.
    """
    number = attempts.latest_attempt(run_dir)
    launch = str(attempts.read_attempt(run_dir, number).get("launch", ""))
    key = launch_key(job_id, restart)
    if launch == key:
        return number
    if launch.startswith("slurm-"):
        _, job, count = launch.split("-")
        if (int(job.split("_")[0]), int(count)) > (int(job_id), restart):
            return None
    return attempts.start_attempt(run_dir, launch=key, job_id=job_id)


def _record_silent_failure(run_dir: Path, attempt: int, code: int) -> None:
    """Record a failure for an attempt that recorded none; a record of the attempt's own is kept."""
    nodes = os.environ.get("SLURM_JOB_NODELIST", "")
    attempts.record_failure(
        run_dir,
        attempt,
        error=f"a rank {describe_exit_code(code)}, on {nodes}",
        log=log_path(run_dir, attempt, 0),
        step=_read_last_step(run_dir, attempt),
        # With several nodes nobody knows which one is to blame, so none will be excluded.
        host=nodes if os.environ.get("SLURM_JOB_NUM_NODES") == "1" else None,
    )


def _read_last_step(run_dir: Path, attempt: int) -> int | None:
    """Return the last step in the progress file, if this attempt wrote it."""
    started = attempts.read_attempt(run_dir, attempt).get("time", time.time())
    progress = read_progress(run_dir)
    done = progress.get("done")
    is_of_attempt = (progress.get("time") or 0.0) > started and progress.get("unit") == "steps"
    return int(done) if is_of_attempt and done is not None else None


def _list_failures(run_dir: Path, job_id: str) -> list[attempts.Failure]:
    """Return the failures of this job's attempts, oldest first. A new job counts from zero."""
    return [
        failure
        for failure in attempts.list_failures(run_dir)
        if attempts.read_attempt(run_dir, failure.attempt).get("job_id") == job_id
    ]


def main(arguments: list[str]) -> int:
    """Run the command line, `RUN_DIR EXIT_CODE`, and return the exit code of the job."""
    run_dir, code = Path(arguments[0]), int(arguments[1])
    keep_others_from_writing()
    # A requeue makes Slurm send SIGTERM to this process, which still has to exclude the node after
    # that.
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    logging.basicConfig(
        level=logging.INFO, format="%(asctime)s %(levelname)s %(name)s: %(message)s"
    )
    try:
        return handle_srun_exit(run_dir, code)
    except NoScontrolError:
        return EXIT_REQUEUE_ME
    except RequeueError as error:
        logger.error("%s", error)
    except Exception:
        # Whatever is wrong here, the job ends with the code of its ranks, and the log says why.
        logger.exception("job of %s is left as it ended", run_dir.name)
    return code


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
