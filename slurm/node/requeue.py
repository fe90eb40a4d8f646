"""Put our own job back into the queue, from inside the job, whatever Slurm does meanwhile.

What the job runs when it starts again is in `slurm/node/job.py`, not here.

There are four traps. After a preemption signal, SIGTERM follows and would kill a plain `scontrol
requeue`. The controller may not answer for minutes. Slurm may have requeued the job already. Or
Slurm is ending the job for good (`scancel`), and then it must stay ended. So `requeue_job` asks for
the job's state first, requeues only a job that Slurm means to keep running, and asks again until it
has an answer.
"""

import logging
import signal
import time
from functools import partial

from slurm.shared.nodes import can_spare_node
from slurm.shared.queue import COMMAND_NOT_FOUND, SlurmError, call_slurm, parse_scontrol

logger = logging.getLogger(__name__)
_PATIENCE_S = 600.0  # a restart of the controller takes minutes
_RETRY_S = 2.0
_KEEPS_RUNNING = ("RUNNING", "SUSPENDED", "CONFIGURING", "STOPPED", "SIGNALING")
# Reasons of a COMPLETING job whose batch script was killed while this rank still lives: nobody else
# will requeue it.
_SCRIPT_KILLED = ("JobLaunchFailure", "NonZeroExitCode")
# Answers that another attempt would get as well.
_REFUSED = ("disabled", "denied", "Invalid job id", "not permitted")


class RequeueError(RuntimeError):
    """Slurm does not take the job back."""


class NoScontrolError(RequeueError):
    """There is no `scontrol` here, as in most containers; outside of them there is."""


def requeue_job(job_id: str, *, patience_s: float = _PATIENCE_S) -> bool:
    """Have the job start again. Return False when Slurm is ending or requeueing it by itself.

    Raises:
        RequeueError: Slurm refuses, or gives no answer within `patience_s`.
    """
    end = time.monotonic() + patience_s
    while True:
        job, error = read_job(job_id)
        state = job.get("JobState")
        if state is not None:
            orphaned = state == "COMPLETING" and job.get("Reason") in _SCRIPT_KILLED
            if state not in _KEEPS_RUNNING and not orphaned:
                logger.info("job %s is %s: no requeue from here", job_id, state)
                return False
            code, error = _scontrol("requeue", job_id)
            if code == 0 or "pending execution" in error:
                logger.info("job %s requeued", job_id)
                return True
        if any(word in error for word in _REFUSED) or time.monotonic() > end:
            raise RequeueError(f"scontrol requeue {job_id}: {error.strip() or 'no answer'}")
        time.sleep(_RETRY_S)


def exclude_node(job_id: str, node: str) -> bool:
    """Keep a pending job off a node, and return whether that worked.

    Nothing is done if too few other nodes could run the job, or if that cannot be known: a job that
    no node fits waits for ever. Nothing is raised if Slurm refuses: the job may then get the same
    node again.
    """
    job, error = read_job(job_id)
    try:
        spared = bool(job) and can_spare_node(job, node, _scontrol)
    except SlurmError as unknown:
        error = str(unknown)
        spared = False
    if not spared:
        logger.info("node %s stays: %s", node, error.strip() or "too few others fit the job")
        return False
    earlier = job.get("ExcNodeList", "(null)")
    nodes = node if earlier == "(null)" else f"{earlier},{node}"
    code, error = _scontrol("update", f"JobId={job_id}", f"ExcNodeList={nodes}")
    outcome = "excluded" if code == 0 else f"not excluded: {error.strip()}"
    logger.info("node %s is %s", node, outcome)
    return code == 0


def read_job(job_id: str) -> tuple[dict[str, str], str]:
    """Return what Slurm says about a job, or nothing and its error message."""
    code, out = _scontrol("-o", "show", "job", job_id)
    return (parse_scontrol(out), "") if code == 0 else ({}, out)


def _scontrol(*arguments: str) -> tuple[int, str]:
    """Return exit code and output of scontrol; it ignores the SIGTERM of a preemption."""
    ignore_sigterm = partial(signal.signal, signal.SIGTERM, signal.SIG_IGN)
    code, out, error = call_slurm("scontrol", *arguments, before_exec=ignore_sigterm)
    if code == COMMAND_NOT_FOUND:
        raise NoScontrolError("scontrol: not found here")
    return code, out or error
