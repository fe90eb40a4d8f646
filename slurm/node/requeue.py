"""Putting our own job back into the queue, from inside it, whatever Slurm does meanwhile.

When the signal was a preemption, SIGTERM follows and would kill a plain `scontrol requeue`; the controller may be away;
Slurm may have been faster; or it is ending the job for good (scancel), which must stay so. So: ask for the state first,
requeue only a job that Slurm means to leave running, and go on asking until there is an answer.
"""

from __future__ import annotations

import logging
import signal
import subprocess
import time

from slurm.shared.queue import parse_scontrol

logger = logging.getLogger(__name__)
_PATIENCE_S = 600.0
_STAYS = ("RUNNING", "SUSPENDED", "CONFIGURING", "STOPPED", "SIGNALING")
_SCRIPT_KILLED = (
    "JobLaunchFailure",
    "NonZeroExitCode",
)  # what the batch script's end looks like to a rank that lives
_REFUSED = ("disabled", "denied", "Invalid job id", "not permitted")


class RequeueError(RuntimeError):
    """Slurm does not take the job back."""


def requeue_job(job_id: str, *, patience_s: float = _PATIENCE_S) -> bool:
    """Have the job start again; False when Slurm is ending or requeueing it by itself.

    Raises RequeueError when Slurm refuses, or gives no answer in time.
    """
    end = time.monotonic() + patience_s
    while True:
        job, error = _job(job_id)
        state = job.get("JobState")
        orphaned = state == "COMPLETING" and job.get("Reason") in _SCRIPT_KILLED
        if state is not None and state not in _STAYS and not orphaned:
            logger.info("job %s is %s: not requeued by itself", job_id, state)
            return False
        if state is not None:
            code, error = _scontrol("requeue", job_id)
            if code == 0 or "pending execution" in error:
                logger.info("job %s requeued", job_id)
                return True
        if any(word in error for word in _REFUSED) or time.monotonic() > end:
            raise RequeueError(f"scontrol requeue {job_id}: {error.strip() or 'no answer'}")
        time.sleep(2)


def exclude_node(job_id: str, node: str) -> bool:
    """Keep a pending job off a node; not where too few others would be left, or the job names its nodes.

    Without effect when Slurm refuses: the job may then meet the node again.
    """
    job, _ = _job(job_id)
    before = [name for name in job.get("ExcNodeList", "").split(",") if name not in ("", "(null)")]
    _, partition = _scontrol("-o", "show", "partition", job.get("Partition", ""))
    total = int(parse_scontrol(partition).get("TotalNodes", "0"))
    needed = int(job.get("NumNodes", "1").split("-")[0])
    named = job.get("ReqNodeList", "(null)") != "(null)"
    if node in before or named or total - len(before) - 1 < needed:
        return False
    code, error = _scontrol("update", f"JobId={job_id}", f"ExcNodeList={','.join([*before, node])}")
    logger.info(
        "node %s is %s", node, "excluded" if code == 0 else f"not excluded: {error.strip()}"
    )
    return code == 0


def _job(job_id: str) -> tuple[dict[str, str], str]:
    """What Slurm says about a job, and what it says when it does not."""
    code, out = _scontrol("-o", "show", "job", job_id)
    return (parse_scontrol(out), "") if code == 0 else ({}, out)


def _scontrol(*arguments: str) -> tuple[int, str]:
    """Exit code and output of scontrol, which does not mind the SIGTERM that comes with a preemption."""
    command = ["scontrol", *arguments]
    try:
        done = subprocess.run(
            command, capture_output=True, text=True, timeout=60, preexec_fn=_ignore_sigterm
        )
    except FileNotFoundError:
        raise RequeueError("scontrol: not found on this node") from None
    except subprocess.TimeoutExpired:
        return 124, "scontrol: no answer in 60 s"
    return done.returncode, done.stdout or done.stderr


def _ignore_sigterm() -> None:
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
