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

logger = logging.getLogger(__name__)
_PATIENCE_S = 600.0
_STAYS = ("RUNNING", "SUSPENDED", "CONFIGURING", "STOPPED", "SIGNALING")
_REFUSED = ("disabled", "denied", "Invalid job id", "not permitted")


class RequeueError(RuntimeError):
    """Slurm does not take the job back."""


def requeue(job_id: str, *, exclude: str | None = None, patience_s: float = _PATIENCE_S) -> bool:
    """Have the job start again, on other nodes than `exclude`; False when Slurm is ending or requeueing it by itself.

    Raises RequeueError when Slurm refuses, or gives no answer in time.
    """
    end = time.monotonic() + patience_s
    while True:
        state, error = _state(job_id)
        if state is not None and state not in _STAYS:
            logger.info("job %s is %s: not requeued by itself", job_id, state)
            return False
        if state is not None:
            if exclude:
                _scontrol("update", f"JobId={job_id}", f"ExcNodeList={exclude}")
            code, error = _scontrol("requeue", job_id)
            if code == 0 or "pending execution" in error:
                logger.info("job %s requeued", job_id)
                return True
        if any(word in error for word in _REFUSED) or time.monotonic() > end:
            raise RequeueError(f"scontrol requeue {job_id}: {error.strip() or 'no answer'}")
        time.sleep(2)


def _state(job_id: str) -> tuple[str | None, str]:
    code, out = _scontrol("-o", "show", "job", job_id)
    facts = dict(part.split("=", 1) for part in out.split() if "=" in part)
    return (facts.get("JobState"), "") if code == 0 else (None, out)


def excluded(job_id: str) -> str:
    """Nodes that the job may not run on, as Slurm writes them; empty when there are none."""
    code, out = _scontrol("-o", "show", "job", job_id)
    facts = dict(part.split("=", 1) for part in out.split() if "=" in part)
    found = facts.get("ExcNodeList", "") if code == 0 else ""
    return "" if found == "(null)" else found


def _scontrol(*arguments: str) -> tuple[int, str]:
    """Exit code and output of scontrol, which does not mind the SIGTERM that comes with a preemption."""
    command = ["scontrol", *arguments]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=60, preexec_fn=_ignore_sigterm)
    except FileNotFoundError:
        raise RequeueError("scontrol: not found on this node") from None
    except subprocess.TimeoutExpired:
        return 124, "scontrol: no answer in 60 s"
    return done.returncode, done.stdout or done.stderr


def _ignore_sigterm() -> None:
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
