"""Faults of the cluster around a training: preemption, controller and nodes."""

import contextlib
import os
import signal
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from fault_case import Case, Fault

from pipeline import attempts, manifest
from slurm.keeper import queue_keeper
from slurm.shared import queue
from slurm.shared.keeper_notes import list_ended_keepers


def preempted(case: Case) -> None:
    """By a job of the high partition that needs the whole node."""
    case.survives(33, case.preempt)
    assert case.facts()["Restarts"] == "1"


def preempted_with_time(case: Case) -> None:
    """The same with time to save: no step is lost."""
    preempted(case)
    assert case.steps() <= 61, case.steps()


def preempted_for_good(case: Case) -> None:
    """Slurm ends the job and its dependent leaves the queue: the keeper submits both again."""
    keep(case)
    first = case.job_id
    case.at_step(33)
    case.preempt()
    case.until(lambda: case.job_id != first, "submitted again")
    assert case.cluster.job(first)["JobState"] == "PREEMPTED"
    end_of_keeper(case)


def keeper_killed(case: Case) -> None:
    """Kill -9 of the keeper at work: the one that it queued before goes on."""
    keep(case)
    case.at_step(33)
    case.preempt()
    case.until(lambda: find_keepers(case), "the keeper starts")
    for pid in find_keepers(case):
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
    end_of_keeper(case)


def keeper_node_lost(case: Case) -> None:
    """The node of a keeper at work dies: another keeper goes on elsewhere."""
    keep(case)
    case.at_step(33)
    case.preempt()
    case.until(lambda: find_keepers(case), "the keeper starts")
    squeue = ["squeue", "-h", "-t", "RUNNING", "-o", "%j %N"]
    jobs = (line.split() for line in case.cluster.run(*squeue).stdout.splitlines())
    node = next(words[1] for words in jobs if "keep" in words[0])
    with lost(case, node):
        case.cluster.kill(node)
        end_of_keeper(case)


def two_keepers(case: Case) -> None:
    """Two keepers start at the same moment: they submit each run again once, not twice."""
    first = keep(case)
    written = case.cluster.run("scontrol", "write", "batch_script", first, "-").stdout
    queue.submit_text(written, what="a second keeper")
    case.at_step(33)
    case.preempt()
    end_of_keeper(case)
    for run in case.runs:
        name = queue.job_name(run.run_dir(case.root))
        ever = case.cluster.run("squeue", "-h", "-t", "all", f"--name={name}", "-o", "%i").stdout
        assert len(ever.split()) == 2, (name, ever)


def keep(case: Case) -> str:
    """Queue the keeper, as `submit` does, and return the id of its job."""
    job_id = queue_keeper(case.runs, case.profile)
    assert job_id is not None
    return job_id


def find_keepers(case: Case) -> list[int]:
    """Processes of its keeper."""
    mark = f"slurm.keeper\0{case.root}/keepers".encode()
    found = []
    for folder in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            if mark in (folder / "cmdline").read_bytes():
                found.append(int(folder.name))
    return found


def end_of_keeper(case: Case) -> None:
    """Both are done in two attempts; the last keeper says so and leaves no other behind."""
    case.finish()
    assert case.attempts() == 2
    keeper_finished(case)
    squeue = ["squeue", "-h", "-t", "PENDING", "-o", "%j"]
    case.until(lambda: "keep" not in case.cluster.run(*squeue).stdout, "no keeper is left")


def keeper_finished(case: Case) -> None:
    """The last keeper says that all is done."""
    case.until(lambda: list(list_ended_keepers(case.runs, case.root)), "the last keeper")
    assert list(list_ended_keepers(case.runs, case.root)) == ["keeper: finished"]


def controller_restarted(case: Case) -> None:
    case.at_step(20)
    with no_controller(case):
        case.at_step(30)
    case.finish()
    assert case.attempts() == 1


def controller_away(case: Case) -> None:
    """The warning comes while the controller is away: rank 0 saves and asks until it is back."""
    case.at_step(33)
    ranks = case.processes("-m slurm.node.job")
    with no_controller(case):
        for pid in ranks:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGUSR2)
        case.until(lambda: attempts.read_interruption(case.run_dir, 1), "saved")
        time.sleep(5)
    case.finish()
    assert case.attempts() == 2 and case.steps() <= 61


def node_down(case: Case) -> None:
    """An administrator takes the node away."""
    case.at_step(30)
    with lost(case) as node:
        case.scontrol("update", f"NodeName={node}", "State=DOWN", "Reason=test")
        case.finish()
    assert case.attempts() == 2 and case.steps() <= 75


def node_dies(case: Case) -> None:
    """Kill -9 of slurmd; a node of this cluster takes all its processes along.
    Slurm finds out by itself.
    """
    case.at_step(30)
    with lost(case) as node:
        case.cluster.kill(node)
        case.finish()
    assert case.attempts() == 2


def node_seems_dead(case: Case) -> None:
    """Slurmd stops answering, the ranks go on: two attempts live at once,
    and only the newer one writes.
    """
    case.at_step(8)
    with lost(case) as node:
        (old,) = case.processes("-m slurm.node.job")
        pids = [
            int(p.parent.name)
            for p in Path("/proc").glob("[0-9]*/cmdline")
            if daemon_of(p, node, case)
        ]
        for pid in pids:
            os.kill(pid, signal.SIGSTOP)
        try:
            case.scontrol("update", f"NodeName={node}", "State=DOWN", "Reason=test")
            case.until(lambda: case.attempts() == 2, "second attempt")
            assert Path(f"/proc/{old}").exists(), "the first attempt should be alive"
            case.until(lambda: not Path(f"/proc/{old}").exists(), "the first attempt ends")
        finally:
            for pid in pids:
                os.kill(pid, signal.SIGCONT)
        case.finish()
    log = (case.run_dir / "logs" / "attempt_0001_rank0.log").read_text()
    # Whichever comes first: a save, or the look at the attempts every 15 seconds.
    assert "not the newest" in log or "a newer attempt" in log, log
    assert manifest.find_done(case.root, case.train.run_id).attempt == 2


@contextlib.contextmanager
def no_controller(case: Case) -> Iterator[None]:
    """The controller is away within the block."""
    case.cluster.stop_controller()
    try:
        yield
    finally:
        case.cluster.start_controller()


def daemon_of(cmdline: Path, node: str, case: Case) -> bool:
    """Whether this is the slurmd of a node of the test's cluster."""
    with contextlib.suppress(OSError):
        words = cmdline.read_bytes().split(b"\0")
        conf = f"SLURM_CONF={case.cluster.env['SLURM_CONF']}".encode()
        ours = conf in (cmdline.parent / "environ").read_bytes().split(b"\0")
        return ours and words[0].endswith(b"slurmd") and words[-2] == node.encode()
    return False


@contextlib.contextmanager
def lost(case: Case, node: str = "") -> Iterator[str]:
    """A node, that of the training if none is named, which is given back in the end."""
    node = node or case.facts()["NodeList"]
    sinfo = ["sinfo", "-h", "-n", node, "-p", "low", "-o", "%T"]
    resume = ["scontrol", "update", f"NodeName={node}", "State=RESUME"]

    def is_back() -> bool:
        if case.cluster.run(*sinfo, check=False).stdout.strip() in ("idle", "mixed", "allocated"):
            return True
        case.cluster.run(*resume, check=False)
        return False

    try:
        yield node
    finally:
        if node not in case.cluster.processes:
            case.cluster.start_node(node)
        case.until(is_back, f"{node} is back")


CLUSTER_FAULTS: dict[str, tuple[Fault, dict[str, Any]]] = {
    "preempted_warned": (preempted_with_time, {}),
    "preempted_warned_at_once": (preempted, {"partition": "low_at_once"}),
    "preempted_with_grace": (preempted_with_time, {}),
    "preempted_at_once": (preempted, {"partition": "low_at_once"}),
    "preempted_for_good": (preempted_for_good, {"partition": "low_cancel"}),
    "keeper_killed": (keeper_killed, {"partition": "low_cancel"}),
    "keeper_node_lost": (keeper_node_lost, {"partition": "low_cancel"}),
    "two_keepers": (two_keepers, {"partition": "low_cancel"}),
    "controller_restarted": (controller_restarted, {"seconds": 0.3}),
    "controller_away": (controller_away, {"seconds": 0.3}),
    "node_down": (node_down, {}),
    "node_seems_dead": (node_seems_dead, {"seconds": 1.5, "later_seconds": 0.1}),
    "node_dies": (node_dies, {}),
}
WITHOUT_USER_SIGNAL = ("preempted_with_grace", "preempted_at_once")
