"""Rank, world size and master address of a process, under Slurm, torchrun or the local executor."""

import contextlib
import os
import socket
from collections.abc import Callable
from dataclasses import dataclass

import submitit

from slurm.shared import queue

# Below Linux's ephemeral range (from 32768), where the kernel could give a port to any outgoing
# connection.
_PORTS = range(12000, 32000)


@dataclass(frozen=True)
class Launch:
    """One start of a run. `key` is equal on all its ranks and differs from every other start's."""

    key: str
    rank: int
    world_size: int
    job_id: str | None


def in_slurm_job() -> bool:
    """Return whether a batch script that submitit made for Slurm started this process."""
    return os.environ.get("SUBMITIT_EXECUTOR") == "slurm"


def launch_key(job_id: str, restart: int) -> str:
    """Return the key of one start of a Slurm job; `restart` counts its requeues."""
    return f"slurm-{job_id}-{restart}"


def join_rendezvous() -> Launch:
    """Set torch's rendezvous variables (RANK ... MASTER_PORT) where not set; return the launch."""
    if in_slurm_job():
        return _join_slurm_job()
    alone = {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0", "MASTER_ADDR": "127.0.0.1"}
    os.environ |= {**alone, **os.environ}
    if "MASTER_PORT" not in os.environ:
        os.environ["MASTER_PORT"] = str(find_free_port())
    key = (
        os.environ.get("MUGS_LAUNCH")  # set by the local executor
        or _torchrun_key()
        or f"pid-{os.getpid()}-{os.urandom(4).hex()}"
    )
    return Launch(key, int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"]), None)


def _torchrun_key() -> str | None:
    """Return a key from what torchrun gives all its ranks; the port tells two starts apart."""
    run_id = os.environ.get("TORCHELASTIC_RUN_ID")
    if run_id is None:
        return None
    restart = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
    return f"torchrun-{run_id}-{os.environ['MASTER_PORT']}-{restart}"


def _join_slurm_job() -> Launch:
    job = submitit.JobEnvironment()
    restart = int(os.environ.get("SLURM_RESTART_COUNT", "0"))
    number = int("".join(digit for digit in str(job.job_id) if digit.isdigit()))
    os.environ |= {
        "RANK": str(job.global_rank),
        "WORLD_SIZE": str(job.num_tasks),
        "LOCAL_RANK": str(job.local_rank),
        "MASTER_ADDR": resolve_master_address(next(iter(job.hostnames))),
        # All ranks must agree on a port without talking to each other, so it is a hash of the job
        # id and restart. The primes spread jobs that share a node, and a restart away from a port
        # that the attempt before may still hold.
        "MASTER_PORT": str(_PORTS[(number * 7919 + restart * 104729) % len(_PORTS)]),
    }
    job_id = str(job.job_id)
    return Launch(launch_key(job_id, restart), job.global_rank, job.num_tasks, job_id)


def resolve_master_address(
    host: str, address: Callable[[str], str | None] = queue.query_node_address
) -> str:
    """Return the name of the first node if it resolves, else the address that Slurm has for it."""
    with contextlib.suppress(OSError):
        socket.getaddrinfo(host, None)
        return host
    return address(host) or host


def find_free_port() -> int:
    """Return a free TCP port of the loopback interface, if possible below the ephemeral range."""
    # A random start keeps runs that begin at the same time from trying the same ports.
    start = int.from_bytes(os.urandom(2), "big")
    for offset in range(64):
        port = _PORTS[(start + offset) % len(_PORTS)]
        with contextlib.suppress(OSError), socket.create_server(("127.0.0.1", port)):
            return port
    with socket.create_server(("127.0.0.1", 0)) as server:
        return int(server.getsockname()[1])
