"""Rank, world and meeting point of a process, whoever started it: Slurm, torchrun or the local executor."""

from __future__ import annotations

import contextlib
import os
import socket
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import submitit

from slurm.shared import queue

_PORTS = range(12000, 32000)  # below the ephemeral range


@dataclass(frozen=True)
class Launch:
    """One start of a run; `key` is equal on all its ranks and differs from every other start's."""

    key: str
    rank: int
    world_size: int
    job_id: str | None


def in_slurm_job() -> bool:
    """Whether submitit's Slurm executor started this process."""
    return os.environ.get("SUBMITIT_EXECUTOR") == "slurm"


def join_rendezvous(run_dir: Path) -> Launch:
    """Set RANK, WORLD_SIZE, LOCAL_RANK, MASTER_ADDR, MASTER_PORT where not set, and say who we are."""
    if in_slurm_job():
        env = submitit.JobEnvironment()
        restart = os.environ.get("SLURM_RESTART_COUNT", "0")
        _export(env, int(restart))
        return Launch(
            f"slurm-{env.job_id}-{restart}", env.global_rank, env.num_tasks, str(env.job_id)
        )
    for key, value in {
        "RANK": "0",
        "WORLD_SIZE": "1",
        "LOCAL_RANK": "0",
        "MASTER_ADDR": "127.0.0.1",
    }.items():
        os.environ.setdefault(key, value)
    if "MASTER_PORT" not in os.environ:
        os.environ["MASTER_PORT"] = str(find_free_port())
    rank, world = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    launch = (
        os.environ.get("MUGS_LAUNCH")
        or _torchrun_launch()
        or f"pid-{os.getpid()}-{os.urandom(4).hex()}"
    )
    return Launch(launch, rank, world, None)


def _torchrun_launch() -> str | None:
    run = os.environ.get("TORCHELASTIC_RUN_ID")
    if run is None:
        return None
    agent, restarts = os.environ["MASTER_PORT"], os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
    return f"torchrun-{run}-{agent}-{restarts}"


def _export(env: Any, restart: int) -> None:
    job = int("".join(c for c in str(env.job_id) if c.isdigit()))
    port = _PORTS[(job * 7919 + restart * 104729) % len(_PORTS)]
    values = {"RANK": env.global_rank, "WORLD_SIZE": env.num_tasks, "LOCAL_RANK": env.local_rank}
    os.environ.update({key: str(value) for key, value in values.items()})
    os.environ["MASTER_ADDR"] = resolve_master_address(next(iter(env.hostnames)))
    os.environ["MASTER_PORT"] = str(port)


def resolve_master_address(
    host: str, address: Callable[[str], str | None] = queue.query_node_address
) -> str:
    """A name or address under which the first node is reached: its name, else what Slurm has for it."""
    with contextlib.suppress(OSError):
        socket.getaddrinfo(host, None)
        return host
    return address(host) or host


def find_free_port() -> int:
    """A free TCP port of the loopback interface, below the ephemeral range where there is one."""
    start = int.from_bytes(os.urandom(2), "big")
    for offset in range(64):
        port = _PORTS[(start + offset) % len(_PORTS)]
        with contextlib.suppress(OSError), socket.create_server(("127.0.0.1", port)):
            return port
    with socket.create_server(("127.0.0.1", 0)) as server:
        return int(server.getsockname()[1])
