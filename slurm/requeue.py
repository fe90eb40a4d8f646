"""Requeueing that survives what Slurm does around it.

submitit requeues a job with one `scontrol requeue`. When the signal is a preemption, SIGTERM follows and
kills that command; when the controller is away, it fails; when Slurm was faster, it is refused. In all three
cases submitit records an error for a job that should go on. Importing this module, which unpickling a job
does, puts a patient version in its place.
"""

from __future__ import annotations

import signal
import subprocess
import time
from typing import Any

from submitit.slurm.slurm import SlurmJobEnvironment

_PATIENCE_S = 600.0


def _ignore_sigterm() -> None:
    signal.signal(signal.SIGTERM, signal.SIG_IGN)


def requeue(self: Any, countdown: int) -> None:
    """Requeue this job, again until Slurm takes it or has done it itself; RuntimeError after ten minutes."""
    end = time.monotonic() + _PATIENCE_S
    while True:
        command = ["scontrol", "requeue", self.job_id]
        done = subprocess.run(command, capture_output=True, text=True, preexec_fn=_ignore_sigterm)
        if done.returncode == 0 or "pending execution" in done.stderr:
            return
        if time.monotonic() > end:
            raise RuntimeError(f"{' '.join(command)}: {done.stderr.strip()}")
        time.sleep(2)


SlurmJobEnvironment._requeue = requeue  # type: ignore[method-assign]


def settle(env: Any) -> None:
    """Remove what an earlier attempt of this job left in the log folder, then let the signal through."""
    env.paths.result_pickle.unlink(missing_ok=True)
    patterns = [f"*_{env.global_rank}_result.pkl.save_tmp"]
    if env.global_rank == 0:
        patterns.append("*_submitted.pkl.save_tmp")
    for pattern in patterns:
        for file in env.paths.folder.glob(pattern):
            file.unlink(missing_ok=True)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGUSR2})
