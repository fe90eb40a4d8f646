"""The ranks of runs as processes of this machine: started, waited for, stopped, and signaled."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Self

from pipeline.files import open_to_append
from pipeline.provenance import code_root
from slurm.node.rendezvous import find_free_port
from slurm.shared.logs import rank_output_path

Ranks = Sequence[subprocess.Popen[bytes]]
"""The processes of one run, by rank."""

_GRACE_S = 10.0
_LOWEST_PRIORITY = ("nice", "-n", "19")
_FORWARDED = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


class LocalProcesses:
    """The processes that are started within the `with` block; none of them outlives it.

    Signals to this process are forwarded: the first as SIGTERM, on which the ranks save and stop;
    the second kills them. `env` holds variables that the ranks get besides those of this process.
    """

    def __init__(self, env: Mapping[str, str] | None = None) -> None:
        self.started: list[subprocess.Popen[bytes]] = []
        self._env = dict(env or {})
        self._signals = 0

    def __enter__(self) -> Self:
        self._previous: dict[int, Any] = {
            number: signal.signal(number, self._forward) for number in _FORWARDED
        }
        return self

    def __exit__(self, *_: object) -> None:
        stop_processes(self.started)
        for number, handler in self._previous.items():
            signal.signal(number, handler)

    def _forward(self, *_: object) -> None:
        self._signals += 1
        for process in self.started:
            if process.poll() is None:
                process.send_signal(signal.SIGTERM if self._signals == 1 else signal.SIGKILL)

    @property
    def signaled(self) -> bool:
        """Whether a signal came: nothing more is started then."""
        return self._signals > 0

    def start(
        self, run_dir: Path, launch: str, count: int, *, beside: bool, on_gpus: bool
    ) -> Ranks:
        """Start the ranks of a run, which computes `on_gpus` or on the CPUs.

        Rank 0 shows its log on the screen. A run that is started `beside` another one shows
        nothing, and has the lowest priority.
        """
        priority = _LOWEST_PRIORITY if beside else ()
        command = [*priority, sys.executable, "-m", "slurm.node.job", str(run_dir)]
        (run_dir / "logs").mkdir(parents=True, exist_ok=True)
        port = find_free_port()
        ranks = []
        for rank in range(count):
            if self.signaled:
                break
            # What a rank prints before it has its own log, such as a failed import, goes here.
            with open_to_append(rank_output_path(run_dir, rank)) as log:
                output = log if rank or beside else None
                process = subprocess.Popen(
                    command,
                    env=_rank_environment(launch, rank, count, port, on_gpus=on_gpus) | self._env,
                    stdin=subprocess.DEVNULL,
                    stdout=output,
                    stderr=output,
                    # Not in our session: Ctrl-C would reach the ranks twice, from the terminal too.
                    start_new_session=True,
                )
            self.started.append(process)
            ranks.append(process)
        return ranks


def wait_for_ranks(ranks: Ranks) -> list[int | None]:
    """Return the exit codes. If a rank fails, stop the others after ten seconds.

    In that time they can record what they noticed of the failure.
    """
    deadline = float("inf")
    while None in (codes := [process.poll() for process in ranks]) and time.monotonic() < deadline:
        if any(codes):
            deadline = min(deadline, time.monotonic() + _GRACE_S)
        time.sleep(0.05)
    stop_processes(ranks)
    return codes


def stop_processes(processes: Ranks) -> None:
    """Ask the processes that still run to end, and kill those that have not after ten seconds."""
    left = [process for process in processes if process.poll() is None]
    for process in left:
        process.terminate()
    for process in left:
        try:
            process.wait(_GRACE_S)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


def _rank_environment(
    launch: str, rank: int, ranks: int, port: int, *, on_gpus: bool
) -> dict[str, str]:
    # In an interactive Slurm job these would make the rank believe that Slurm started it.
    env = {
        key: value
        for key, value in os.environ.items()
        if not key.startswith(("SLURM_", "SUBMITIT_"))
    }
    if not on_gpus:
        # By default a thread that has done its part spins until the others have done theirs. Where
        # other programs use the cores, it takes the core that a thread it waits for needs. In small
        # letters, as libgomp does not know the I of PASSIVE in a Turkish locale.
        env.setdefault("OMP_WAIT_POLICY", "passive")
    # The default, as many threads as cores in every rank, would slow all of them down.
    threads = str(max(1, len(os.sched_getaffinity(0)) // ranks))
    return env | {
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
        "WORLD_SIZE": str(ranks),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
        "MUGS_LAUNCH": launch,
        "OMP_NUM_THREADS": threads,
        "MKL_NUM_THREADS": threads,
        "PYTHONPATH": os.pathsep.join(filter(None, [str(code_root()), env.get("PYTHONPATH")])),
        "PYTHONSAFEPATH": "1",
    }
