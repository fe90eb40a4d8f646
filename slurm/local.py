"""The local executor: stage runs on this machine, one after the other, each on one or more processes.

A run that only watches another (`StageConfig.alongside`) runs beside it, at the lowest priority; on a machine with
GPUs, which the other one takes, it comes after it.
"""

from __future__ import annotations

import logging
import os
import signal
import subprocess
import sys
import time
import uuid
from collections.abc import Callable, Mapping, Sequence
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
_LAST = ("nice", "-n", "19")
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
    early: dict[str, Outcome] = {}
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
            outcomes.append(early.get(run.run_id, Outcome(run, "done")))
            continue
        if run.run_id in early:
            outcomes.append(early[run.run_id])
        elif blocked:
            outcomes.append(Outcome(run, "not run", f"needs {', '.join(blocked)}"))
        elif alive := [job for job in jobs.get(run.run_id, []) if job.alive]:
            outcomes.append(Outcome(run, "not run", f"is job {alive[0].job_id} of the cluster, {alive[0].state}"))
        else:
            group = [run, *_companions(run, runs, run_root, jobs)]
            for each in group:
                if started:
                    started(each, ranks or default_ranks(each))
            found = _run_together(group, run_root, ranks)
            if any(outcome.state == "interrupted" for outcome in found):
                return outcomes + found
            outcomes.append(found[0])
            early |= {outcome.run.run_id: outcome for outcome in found[1:]}
        if outcomes[-1].state != "finished":
            bad[run.run_id] = run.name
    return outcomes


def default_ranks(run: StageRun) -> int:
    """Processes of a run on this machine: what it asks for, at most one per GPU, one where there is none."""
    if not run.resources.gpu:
        return run.resources.ranks
    return min(run.resources.ranks, max(1, _gpus_here()))


def _gpus_here() -> int:
    return len(list(Path("/dev").glob("nvidia[0-9]*")))


def _companions(
    run: StageRun, runs: Sequence[StageRun], run_root: Path, jobs: Mapping[str, Sequence[queue.QueuedJob]]
) -> list[StageRun]:
    """Runs to start beside this one: all else that they need is done."""
    if _gpus_here():
        return []
    found = []
    for other in runs:
        watched = {other.needs[role] for role in other.config.alongside() if role in other.needs}
        rest = set(other.needs.values()) - {run.run_id}
        open_ = manifest.find_done(run_root, other.run_id) is None
        elsewhere = any(job.alive for job in jobs.get(other.run_id, ()))
        if run.run_id in watched and open_ and not elsewhere and all(manifest.find_done(run_root, r) for r in rest):
            found.append(other)
    return found


@dataclass(frozen=True)
class _Started:
    """Processes of a run; `refusal` says why there are none."""

    run: StageRun
    run_dir: Path
    launch: str
    began: float
    processes: Sequence[subprocess.Popen[bytes]] = ()
    refusal: str = ""


def _run_together(group: Sequence[StageRun], run_root: Path, ranks: int | None) -> list[Outcome]:
    """Run the first; the others start beside it and are stopped when it fails."""
    with _Forwarding() as forwarding:
        started = [_start(run, run_root, ranks or default_ranks(run), forwarding, run is not group[0]) for run in group]
        outcomes = []
        for each in started:
            codes = _wait(each.processes)
            _stop(each.processes)
            outcomes.append(_outcome(each, run_root, codes, forwarding.count > 0))
            if outcomes[0].state not in ("finished", "interrupted"):
                return [outcomes[0], *(Outcome(run, "not run", f"needs {group[0].name}") for run in group[1:])]
    return outcomes


def _start(run: StageRun, run_root: Path, ranks: int, forwarding: _Forwarding, beside: bool) -> _Started:
    run_dir, launch, began = run.run_dir(run_root), f"local-{uuid.uuid4().hex[:12]}", time.monotonic()
    if attempts.running_here(run_dir):
        pid = (attempts.describe(run_dir, attempts.latest(run_dir)) or {}).get("pid")
        return _Started(run, run_dir, launch, began, refusal=f"is running on this machine already, process {pid}")
    runfile.write(run_root, run)
    return _Started(run, run_dir, launch, began, _spawn(run_dir, launch, ranks, forwarding, beside))


def _outcome(started: _Started, run_root: Path, codes: Sequence[int | None], signalled: bool) -> Outcome:
    run, run_dir, launch = started.run, started.run_dir, started.launch
    if started.refusal:
        return Outcome(run, "failed", started.refusal)
    seconds = time.monotonic() - started.began
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


def _spawn(
    run_dir: Path, launch: str, ranks: int, forwarding: _Forwarding, beside: bool
) -> list[subprocess.Popen[bytes]]:
    """The ranks, a session of their own each: signals reach them through this process only.

    Rank 0 shows its log on the screen, unless it runs `beside` another run.
    """
    port, started = free_port(), []
    command = [*(_LAST if beside else ()), sys.executable, "-m", "slurm.job", str(run_dir)]
    (run_dir / "logs").mkdir(parents=True, exist_ok=True)
    for rank in range(ranks):
        if forwarding.count:
            break
        env = _environment(launch, rank, ranks, port)
        with (run_dir / "logs" / f"rank{rank}.err").open("ab") as log:
            out = None if rank == 0 and not beside else log
            process = subprocess.Popen(
                command, env=env, stdin=subprocess.DEVNULL, stdout=out, stderr=out, start_new_session=True
            )
        forwarding.processes.append(process)
        started.append(process)
    return started


def _wait(processes: Sequence[subprocess.Popen[bytes]]) -> list[int | None]:
    """Exit codes; when one ends with an error, the others get ten seconds to notice and are not waited for longer."""
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
