"""The ranks of runs as processes of this machine: started, waited for, stopped, and told of signals."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from pipeline.provenance import code_root
from slurm.node.rendezvous import find_free_port

Ranks = Sequence[subprocess.Popen[bytes]]
"""The processes of one run, by rank."""

_GRACE_S = 10.0
_LAST = ("nice", "-n", "19")
_FORWARDED = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


class LocalProcesses:
    """What is started within the block; nothing of it outlives that.

    Signals to this process are passed on: the first as SIGTERM, which the ranks act on; the second kills.
    """

    def __init__(self) -> None:
        self._all: list[subprocess.Popen[bytes]] = []
        self._signals = 0
        self._before: dict[int, Any] = {}

    def __enter__(self) -> LocalProcesses:
        self._before = {number: signal.signal(number, self._forward) for number in _FORWARDED}
        return self

    def __exit__(self, *_: object) -> None:
        stop_processes(self._all)
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _forward(self, *_: object) -> None:
        self._signals += 1
        for process in self._all:
            if process.poll() is None:
                process.send_signal(signal.SIGTERM if self._signals == 1 else signal.SIGKILL)

    @property
    def signalled(self) -> bool:
        """Whether a signal came: nothing more is started then."""
        return self._signals > 0

    def start(self, run_dir: Path, launch: str, count: int, *, beside: bool) -> Ranks:
        """Start the ranks of a run, each in a session of its own: signals reach them through this process only.

        Rank 0 shows its log on the screen; not so `beside` another run, where all ranks have the lowest priority.
        """
        command = [*(_LAST if beside else ()), sys.executable, "-m", "slurm.node.job", str(run_dir)]
        (run_dir / "logs").mkdir(parents=True, exist_ok=True)
        port, ranks = find_free_port(), []
        for rank in range(count):
            if self.signalled:
                break
            with (run_dir / "logs" / f"rank{rank}.err").open("ab") as log:
                out, env = log if rank or beside else None, _environment(launch, rank, count, port)
                process = subprocess.Popen(
                    command,
                    env=env,
                    stdin=subprocess.DEVNULL,
                    stdout=out,
                    stderr=out,
                    start_new_session=True,
                )
            self._all.append(process)
            ranks.append(process)
        return ranks


def wait_for_ranks(ranks: Ranks) -> list[int | None]:
    """Exit codes; when one ends with an error, the others get ten seconds to notice, and then are stopped."""
    deadline = float("inf")
    while None in (codes := [process.poll() for process in ranks]) and time.monotonic() < deadline:
        if any(codes):
            deadline = min(deadline, time.monotonic() + _GRACE_S)
        time.sleep(0.05)
    stop_processes(ranks)
    return codes


def stop_processes(processes: Ranks) -> None:
    """Ask those that are left to end, and kill what has not done so after ten seconds."""
    left = [process for process in processes if process.poll() is None]
    for process in left:
        process.terminate()
    for process in left:
        try:
            process.wait(_GRACE_S)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


def _environment(launch: str, rank: int, ranks: int, port: int) -> dict[str, str]:
    threads = str(max(1, len(os.sched_getaffinity(0)) // ranks))
    path = os.pathsep.join(filter(None, [str(code_root()), os.environ.get("PYTHONPATH")]))
    env = {
        key: value
        for key, value in os.environ.items()
        if not key.startswith(("SLURM_", "SUBMITIT_"))
    }
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
