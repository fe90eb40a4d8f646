"""The local executor: stage runs on this machine, one after the other, each on one or more processes."""

from __future__ import annotations

import logging
import os
import signal
import subprocess
import sys
import time
import uuid
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pipeline import attempts, manifest, runfile
from pipeline.provenance import code_root
from pipeline.spec import ConfigError, StageRun
from slurm import queue
from slurm.environment import free_port
from slurm.job import INTERRUPTED

logger = logging.getLogger(__name__)
_GRACE_S = 10.0
_FORWARDED = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


@dataclass(frozen=True)
class Outcome:
    """What became of one run: `state` is done (before) | finished (now) | failed | interrupted | not run."""

    run: StageRun
    state: str
    detail: str = ""
    seconds: float = 0.0
    log: str = ""


def run_here(
    runs: Sequence[StageRun],
    run_root: Path,
    *,
    ranks: int | None = None,
    started: Callable[[StageRun, int], None] | None = None,
) -> list[Outcome]:
    """Run what is not done, in the given (topological) order; `started` is told of each run and its ranks.

    When a run fails, what depends on it is not run and the rest is; after an interruption nothing more is run.
    ConfigError when an input is neither done nor among `runs`.
    """
    outcomes: list[Outcome] = []
    bad: dict[str, str] = {}
    ids = {run.run_id for run in runs}
    for run in runs:
        for role, need in run.needs.items():
            if need not in ids and manifest.find_done(run_root, need) is None:
                raise ConfigError(f"{run.name}: its input {role!r} (run {need}) is not done; run it too")
    jobs = queue.queued(runs, run_root)
    for run in runs:
        blocked = [bad[need] for need in run.needs.values() if need in bad]
        if manifest.find_done(run_root, run.run_id) is not None:
            outcomes.append(Outcome(run, "done"))
            continue
        if blocked:
            outcomes.append(Outcome(run, "not run", f"needs {', '.join(blocked)}"))
        elif alive := [job for job in jobs.get(run.run_id, []) if job.alive]:
            outcomes.append(Outcome(run, "not run", f"is job {alive[0].job_id} of the cluster, {alive[0].state}"))
        else:
            count = ranks or default_ranks(run)
            if started:
                started(run, count)
            outcomes.append(_run_one(run, run_root, count))
        if outcomes[-1].state == "interrupted":
            return outcomes
        if outcomes[-1].state != "finished":
            bad[run.run_id] = run.name
    return outcomes


def default_ranks(run: StageRun) -> int:
    """Processes of a run on this machine: what it asks for, at most one per GPU, one where there is none."""
    if not run.resources.gpu:
        return run.resources.ranks
    here = len(list(Path("/dev").glob("nvidia[0-9]*")))
    return min(run.resources.ranks, max(1, here))


def _run_one(run: StageRun, run_root: Path, ranks: int) -> Outcome:
    run_dir = run.run_dir(run_root)
    if attempts.running_here(run_dir):
        pid = (attempts.describe(run_dir, attempts.latest(run_dir)) or {}).get("pid")
        return Outcome(run, "failed", f"is running on this machine already, process {pid}")
    runfile.write(run_root, run)
    began, launch = time.monotonic(), f"local-{uuid.uuid4().hex[:12]}"
    codes, signalled = _spawn_and_wait(run_dir, launch, ranks)
    seconds = time.monotonic() - began
    if not any(codes) and manifest.find_done(run_root, run.run_id) is not None:
        return Outcome(run, "finished", "", seconds)
    if signalled or INTERRUPTED in codes:
        reason = attempts.interruption(run_dir, attempts.latest(run_dir)) or "stopped at once"
        return Outcome(run, "interrupted", f"{reason}; run again to resume", seconds)
    failure = _failure(run_dir, launch, codes)
    return Outcome(run, "failed", failure.error, seconds, failure.log)


def _failure(run_dir: Path, launch: str, codes: Sequence[int | None]) -> attempts.Failure:
    """The failure record of a launch, written here for a process that could not."""
    try:
        number = attempts.find(run_dir, launch, timeout_s=0)
    except TimeoutError:
        number = attempts.start(run_dir, launch=launch)
    rank, code = next(((r, c) for r, c in enumerate(codes) if c), (0, 0))
    how = f"was killed by signal {-code}" if code and code < 0 else f"ended with exit code {code}"
    log = run_dir / "logs" / f"attempt_{number:04d}_rank{rank}.log"
    attempts.fail(run_dir, number, error=f"rank {rank} {how}", log=log)
    found = attempts.failure(run_dir, number)
    assert found is not None
    return found


def _environment(launch: str, rank: int, ranks: int, port: int) -> dict[str, str]:
    threads = str(max(1, len(os.sched_getaffinity(0)) // ranks))
    path = os.pathsep.join(filter(None, [str(code_root()), os.environ.get("PYTHONPATH")]))
    env = {key: value for key, value in os.environ.items() if not key.startswith(("SLURM_", "SUBMITIT_"))}
    return env | {
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
        "WORLD_SIZE": str(ranks),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
        "MUGS_LAUNCH": launch,
        "OMP_NUM_THREADS": threads,
        "MKL_NUM_THREADS": threads,
        "PYTHONPATH": path,
        "PYTHONSAFEPATH": "1",
    }


class _Forwarding:
    """Signals to this process, passed on to the ranks: the first as SIGTERM, which they act on; the second kills."""

    def __init__(self) -> None:
        self.processes: list[subprocess.Popen[bytes]] = []
        self.count = 0
        self.before: dict[int, Any] = {}

    def __enter__(self) -> _Forwarding:
        self.before = {number: signal.signal(number, self._forward) for number in _FORWARDED}
        return self

    def __exit__(self, *_: object) -> None:
        _stop(self.processes)
        for number, handler in self.before.items():
            signal.signal(number, handler)

    def _forward(self, *_: object) -> None:
        self.count += 1
        for process in self.processes:
            if process.poll() is None:
                process.send_signal(signal.SIGTERM if self.count == 1 else signal.SIGKILL)


def _spawn_and_wait(run_dir: Path, launch: str, ranks: int) -> tuple[list[int | None], bool]:
    """Exit codes of all ranks, and whether this process was told to stop (Ctrl-C, SIGTERM, hang-up).

    When one rank ends with an error, the others get ten seconds to notice and are then stopped. The ranks are a
    session of their own each: signals reach them through this process only.
    """
    port = free_port()
    command = [sys.executable, "-m", "slurm.job", str(run_dir)]
    (run_dir / "logs").mkdir(parents=True, exist_ok=True)
    with _Forwarding() as forwarding:
        for rank in range(ranks):
            if forwarding.count:
                break
            env = _environment(launch, rank, ranks, port)
            with (run_dir / "logs" / f"rank{rank}.err").open("ab") as log:
                out = None if rank == 0 else log
                process = subprocess.Popen(
                    command, env=env, stdin=subprocess.DEVNULL, stdout=out, stderr=out, start_new_session=True
                )
            forwarding.processes.append(process)
        return _wait(forwarding.processes), forwarding.count > 0


def _wait(processes: Sequence[subprocess.Popen[bytes]]) -> list[int | None]:
    deadline: float | None = None
    while any(process.poll() is None for process in processes):
        if deadline is None and any(process.returncode for process in processes):
            deadline = time.monotonic() + _GRACE_S
        if deadline is not None and time.monotonic() > deadline:
            break
        time.sleep(0.05)
    return [process.returncode for process in processes]


def _stop(processes: Sequence[subprocess.Popen[bytes]]) -> None:
    left = [process for process in processes if process.poll() is None]
    for process in left:
        process.terminate()
    for process in left:
        try:
            process.wait(_GRACE_S)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
