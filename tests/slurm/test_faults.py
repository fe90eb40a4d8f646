"""Faults on a real Slurm: each training ends with the weights of an undisturbed one, and its dependent runs after it.

The trainings of one group run at the same time, each with a fault of its own; a test per fault looks at the outcome.
"""

from __future__ import annotations

import contextlib
import importlib
import json
import os
import signal
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from pipeline import attempts, manifest
from pipeline.atomic import read_json
from pipeline.identity import run_id
from pipeline.spec import Resources, StageRun
from slurm import queue
from slurm.cluster import ClusterProfile
from slurm.status import RunStatus, status
from slurm.submit import submit

pytestmark = pytest.mark.slurm

STAGE = '''
"""A training of a few numbers by the real loop, and a stage that depends on it."""
import os, time
from pathlib import Path
from pipeline.spec import Runtime, StageConfig, StageOutput

class Train(StageConfig):
    case: str
    steps: int = 60
    fault: str = Runtime("")
    seconds: float = Runtime(0.1)
    later_seconds: float | None = Runtime(None)

class Digest(StageConfig):
    pass

class Sum:
    def __init__(self, cfg, run_dir, attempt):
        import torch
        later = cfg.later_seconds if attempt > 1 else None
        self.seconds = cfg.seconds if later is None else later
        self.cfg, self.run_dir, self.total_steps = cfg, run_dir, cfg.steps
        self.value = torch.zeros(64, dtype=torch.float32)

    def steps(self, start):
        import torch
        for step in range(start, self.total_steps):
            with (self.run_dir / "at").open("a") as file:
                file.write(f"{step}\\n")
            time.sleep(self.seconds)
            if self.cfg.fault and step == 30 and not (self.run_dir / "spent").exists():
                if not self.cfg.fault.endswith("always"):
                    (self.run_dir / "spent").touch()
                if self.cfg.fault.startswith("hang"):
                    time.sleep(1000)
                raise RuntimeError("CUDA error: an illegal memory access was encountered")
            generator = torch.Generator().manual_seed(step)
            self.value = 0.9 * self.value + torch.randn(64, generator=generator)
            yield

    def check(self): pass
    def parts(self): return {"sum": {"value": self.value}}
    def notes(self): return {}
    def load(self, parts, notes): self.value = parts["sum"]["value"]

def train(ctx, cfg):
    from mugs.engine import distributed
    from mugs.engine.loop import train as loop
    distributed.init()
    task = Sum(cfg, ctx.run_dir, ctx.attempt)
    loop(task, ctx.run_dir / "checkpoints", every=25, control=ctx.control)
    out = ctx.run_dir / "weights.txt"
    if distributed.is_main():
        out.write_text(task.value.numpy().tobytes().hex())
    distributed.barrier()
    return StageOutput(outputs={"weights": out})

def digest(ctx, cfg):
    out = ctx.run_dir / "digest.txt"
    out.write_text(ctx.inputs["weights"].output("weights").read_text()[-40:])
    return StageOutput(outputs={"digest": out})
'''


class Case:
    """One training and its dependent on the cluster, and what a fault needs to know of them."""

    lock = threading.Lock()

    def __init__(self, cluster: Any, folder: Path, module: Any, name: str, **options: Any) -> None:
        self.cluster, self.name, self.root = cluster, name, folder / "runs"
        fields = {key: options.pop(key) for key in ("fault", "seconds", "later_seconds") if key in options}
        need = {"gpu": False, "cpus_per_rank": 1, "hours": 0.5, "memory_gb": 1}
        need |= {key: options.pop(key) for key in Resources.model_fields if key in options}
        resources = Resources(**need)
        cfg = module.Train(case=name, **fields)
        identity = run_id("train", cfg, {})
        self.train = StageRun("train", name, identity, cfg, {}, resources, "slurm_toy:train")
        below = {"weights": identity}
        identity = run_id("digest", module.Digest(), below)
        small = Resources(gpu=False, cpus_per_rank=1, hours=0.5, memory_gb=1)
        self.digest = StageRun("digest", name, identity, module.Digest(), below, small, "slurm_toy:digest")
        self.runs = [self.train, self.digest]
        self.run_dir = self.train.run_dir(self.root)
        options = {"partition": "low", "signal_delay_s": 30, **options}
        self.profile = ClusterProfile(run_root=self.root, **options)

    def submit(self) -> None:
        """Queue both; one thread at a time, since the environment is cleaned meanwhile."""
        with self.lock:
            submit(self.runs, self.profile)

    @property
    def job_id(self) -> str:
        """Id of the training's job."""
        return str(json.loads((self.run_dir / queue.JOB_NOTE).read_text())["job_id"])

    def facts(self) -> dict[str, str]:
        """What Slurm says about the training's job."""
        return dict(self.cluster.job(self.job_id))

    def states(self) -> list[RunStatus]:
        """Status of both."""
        return status(self.runs, self.root)

    def until(self, true: Callable[[], Any], what: str, timeout_s: float = 240) -> None:
        """Wait for a condition."""
        end = time.monotonic() + timeout_s
        while not true():
            if time.monotonic() > end:
                raise AssertionError(f"{self.name}: {what}: {self.facts()} {self.states()} {self.story()}")
            time.sleep(0.1)

    def steps(self) -> int:
        """Steps begun so far, repeated ones included."""
        path = self.run_dir / "at"
        return path.read_bytes().count(b"\n") if path.exists() else 0

    def at_step(self, step: int) -> None:
        """Wait until so many steps were begun."""
        self.until(lambda: self.steps() >= step, f"step {step}")

    def running(self) -> None:
        """Wait until Slurm has started the job."""
        self.until(lambda: self.facts().get("JobState") == "RUNNING", "running")

    def scontrol(self, *arguments: str) -> None:
        """A command to the controller that must succeed."""
        self.cluster.run("scontrol", *arguments)

    def preempt(self) -> None:
        """A short job of the high partition that needs the node of the training for itself."""
        node = self.facts()["NodeList"]
        high = ["-p", "high", "--exclusive", "-w", node, "--output=/dev/null", "--wrap", "sleep 1"]
        self.cluster.run("sbatch", "--parsable", *high)

    def processes(self, mark: str) -> list[int]:
        """Processes of the training's job whose command line holds `mark`."""
        found: list[int] = []
        if not (self.run_dir / queue.JOB_NOTE).exists():
            return found
        job = f"SLURM_JOB_ID={self.job_id}".encode()
        for folder in Path("/proc").glob("[0-9]*"):
            with contextlib.suppress(OSError):
                command = (folder / "cmdline").read_bytes().replace(b"\0", b" ").decode()
                ours = job in (folder / "environ").read_bytes().split(b"\0") or f"[{self.job_id}." in command
                if ours and mark in command and not command.startswith("srun"):
                    found.append(int(folder.name))
        return found

    def kill(self, mark: str) -> None:
        """kill -9 those."""
        found = self.processes(mark)
        assert found, f"no process {mark} of job {self.job_id}"
        for pid in found:
            os.kill(pid, signal.SIGKILL)

    def finish(self) -> None:
        """Wait until both are done."""
        self.until(lambda: {s.state for s in self.states()} == {"done"}, "done")

    def attempts(self) -> int:
        """How often the training was started."""
        return attempts.latest(self.run_dir)

    def result(self) -> tuple[str, Any]:
        """The digest, and the checksums of the last checkpoint."""
        entry = manifest.find_done(self.root, self.digest.run_id)
        assert entry is not None, self.name
        state = read_json(self.run_dir / "checkpoints" / f"step_{self.train.config.steps:08d}" / "state.json") or {}  # type: ignore[attr-defined]
        return entry.output("digest").read_text(), state["files"]

    def story(self) -> str:
        """The logs' last lines, for a message."""
        logs = sorted((self.run_dir / "logs").glob("*"))
        return "\n".join(f"--- {p.name}\n{p.read_text(errors='replace')[-1500:]}" for p in logs)


def undisturbed(case: Case) -> None:
    case.finish()
    assert case.attempts() == 1


def requeued(case: Case) -> None:
    case.at_step(30)
    case.scontrol("requeue", case.job_id)
    case.finish()
    assert case.attempts() == 2 and case.facts()["Restarts"] == "1"


def warned(case: Case) -> None:
    """USR2 alone, as before a time limit or at a preemption with `preempt_send_user_signal`: no step is lost."""
    case.at_step(33)
    case.cluster.run("scancel", "--signal=USR2", case.job_id)
    case.finish()
    assert case.attempts() == 2 and case.steps() <= 61, case.steps()


def terminated(case: Case) -> None:
    """SIGTERM alone, as in the grace time of a preemption: saved as well."""
    case.at_step(33)
    case.cluster.run("scancel", "--signal=TERM", case.job_id)
    case.finish()
    assert case.attempts() == 2 and case.steps() <= 61, case.steps()


def warned_while_importing(case: Case) -> None:
    case.until(lambda: case.processes("-m slurm.job"), "Python runs")
    case.cluster.run("scancel", "--signal=USR2", case.job_id)
    case.until(lambda: case.facts().get("Restarts") == "1", "requeued")
    assert case.steps() == 0, "too late for this test"
    case.finish()


def cancelled(case: Case) -> None:
    case.at_step(30)
    case.cluster.run("scancel", case.job_id)
    case.until(lambda: case.states()[0].state in ("failed", "waiting"), "stopped")
    case.until(lambda: case.states()[1].state == "waiting", "dependent left the queue")
    assert "CANCELLED" in case.states()[0].detail and case.facts()["Restarts"] == "0"
    case.submit()
    case.finish()


def rank_killed(case: Case) -> None:
    case.at_step(30)
    case.kill("-m slurm.job")
    case.finish()
    failure = attempts.failure(case.run_dir, 1)
    assert failure is not None and "killed by SIGKILL" in failure.error and case.attempts() == 2


def crashed(case: Case) -> None:
    """An error that another attempt may not meet: again, on the other node."""
    case.finish()
    failure = attempts.failure(case.run_dir, 1)
    assert failure is not None and failure.step == 30 and "CUDA error" in failure.error
    hosts = [str((attempts.describe(case.run_dir, number) or {})["host"]) for number in (1, 2)]
    assert hosts[0] != hosts[1] or not case.cluster.namespaces, hosts


def crashes_always(case: Case) -> None:
    case.until(lambda: case.states()[0].state == "failed", "failed")
    detail = case.states()[0].detail
    assert "failed twice after step 30" in detail and case.attempts() == 2, detail


def hung(case: Case) -> None:
    case.finish()
    failure = attempts.failure(case.run_dir, 1)
    assert failure is not None and "hung: no step for" in failure.error and failure.step == 30
    assert "slurm_toy.py" in Path(failure.log).read_text(), "no stacks"


def batch_step_killed(case: Case) -> None:
    """The batch script's slurmstepd: the ranks go on and finish; Slurm takes it for a lost node and starts it again."""
    case.at_step(30)
    case.kill(f"slurmstepd: [{case.job_id}.batch]")
    case.until(
        lambda: case.facts()["Restarts"] == "1" and case.facts()["JobState"] == "COMPLETED", "again, for nothing"
    )
    case.finish()
    assert case.attempts() == 1


def batch_shell_killed(case: Case) -> None:
    """The batch script itself: nobody is left to queue the job again but rank 0."""
    case.at_step(30)
    case.kill("slurm_script")
    case.finish()
    assert case.attempts() == 2 and case.facts()["Restarts"] == "1"


def time_limit(case: Case) -> None:
    """One minute for a training of two, saved on the warning half a minute before."""
    case.finish()
    assert case.attempts() >= 2 and case.steps() <= 60 + case.attempts(), (case.attempts(), case.steps())


def preempted(case: Case) -> None:
    """By a job of the high partition that needs the whole node."""
    case.at_step(33)
    case.preempt()
    case.finish()
    assert case.attempts() == 2 and case.facts()["Restarts"] == "1"


def preempted_with_time(case: Case) -> None:
    """The same with time to save: no step is lost."""
    preempted(case)
    assert case.steps() <= 61, case.steps()


def controller_restarted(case: Case) -> None:
    case.at_step(20)
    case.cluster.stop_controller()
    try:
        case.at_step(30)
    finally:
        case.cluster.start_controller()
    case.finish()
    assert case.attempts() == 1


def controller_away(case: Case) -> None:
    """The warning comes while the controller is away: rank 0 saves and asks until it is back."""
    case.at_step(33)
    ranks = case.processes("-m slurm.job")
    case.cluster.stop_controller()
    try:
        for pid in ranks:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGUSR2)
        case.until(lambda: attempts.interruption(case.run_dir, 1), "saved")
        time.sleep(5)
    finally:
        case.cluster.start_controller()
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
    """kill -9 of slurmd; a node of this cluster takes all its processes along. Slurm finds out by itself."""
    case.at_step(30)
    with lost(case) as node:
        case.cluster.kill(node)
        case.finish()
        case.cluster.start_node(node)
    assert case.attempts() == 2


def node_seems_dead(case: Case) -> None:
    """slurmd stops answering, the ranks go on: two attempts live at once, and only the newer one writes."""
    case.at_step(8)
    with lost(case) as node:
        (old,) = case.processes("-m slurm.job")
        pids = [int(p.parent.name) for p in Path("/proc").glob("[0-9]*/cmdline") if daemon_of(p, node, case)]
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
    assert "not the newest" in log, log
    entry = manifest.find_done(case.root, case.train.run_id)
    assert entry is not None and entry.attempt == 2


def daemon_of(cmdline: Path, node: str, case: Case) -> bool:
    """Whether this is the slurmd of a node of the test's cluster."""
    with contextlib.suppress(OSError):
        words = cmdline.read_bytes().split(b"\0")
        conf = f"SLURM_CONF={case.cluster.env['SLURM_CONF']}".encode()
        ours = conf in (cmdline.parent / "environ").read_bytes().split(b"\0")
        return ours and words[0].endswith(b"slurmd") and words[-2] == node.encode()
    return False


@contextlib.contextmanager
def lost(case: Case) -> Iterator[str]:
    """The node of a training, which is given back in the end."""
    node = case.facts()["NodeList"]
    try:
        yield node
    finally:
        case.until(lambda: node in case.cluster.processes, "slurmd")
        idle = ("idle", "mixed", "allocated")
        while case.cluster.run("sinfo", "-h", "-n", node, "-p", "low", "-o", "%T").stdout.strip() not in idle:
            case.cluster.run("scontrol", "update", f"NodeName={node}", "State=RESUME", check=False)
            time.sleep(0.5)


JOB_FAULTS: dict[str, tuple[Callable[[Case], None], dict[str, Any]]] = {
    "time_limit": (time_limit, {"seconds": 0.5, "max_hours": 1 / 60}),
    "undisturbed": (undisturbed, {}),
    "requeued": (requeued, {}),
    "warned": (warned, {}),
    "terminated": (terminated, {}),
    "warned_while_importing": (warned_while_importing, {}),
    "cancelled": (cancelled, {}),
    "rank_killed": (rank_killed, {}),
    "crashed": (crashed, {"fault": "crash"}),
    "crashes_always": (crashes_always, {"fault": "crash always"}),
    "hung": (hung, {"fault": "hang", "hang_minutes": 0.1}),
    "batch_step_killed": (batch_step_killed, {}),
    "batch_shell_killed": (batch_shell_killed, {}),
}


@pytest.fixture(scope="module")
def toy(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    """The module with the toy stages, found here and by the jobs."""
    package = tmp_path_factory.mktemp("package")
    (package / "slurm_toy.py").write_text(STAGE)
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(package))
        patch.setenv("PYTHONPATH", str(package))
        patch.setenv("OMP_NUM_THREADS", "1")
        sys.modules.pop("slurm_toy", None)
        yield importlib.import_module("slurm_toy")


Played = dict[str, tuple[Case, str]]


def play(cases: dict[str, Case], faults: dict[str, Callable[[Case], None]], at_once: int) -> Played:
    """Each case with its fault, some at once; the case and what went wrong."""

    def one(name: str) -> str:
        try:
            cases[name].submit()
            faults[name](cases[name])
        except BaseException:
            return traceback.format_exc()
        return ""

    with ThreadPoolExecutor(at_once) as pool:
        return {name: (cases[name], wrong) for name, wrong in zip(cases, pool.map(one, cases), strict=True)}


@pytest.fixture(scope="module")
def played(shared_cluster: Any, toy: Any, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Played]:
    """The faults that concern one job each."""
    folder = tmp_path_factory.mktemp("faults")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("SLURM_CONF", shared_cluster.env["SLURM_CONF"])
        only = os.environ.get("FAULTS", ",".join(JOB_FAULTS)).split(",")
        cases = {n: Case(shared_cluster, folder, toy, n, **o) for n, (_, o) in JOB_FAULTS.items() if n in only}
        yield play(cases, {name: fault for name, (fault, _) in JOB_FAULTS.items()}, at_once=4)


@pytest.mark.parametrize("name", JOB_FAULTS)
def test_fault_of_a_job(played: Played, name: str) -> None:
    case, wrong = played[name]
    assert not wrong, wrong
    if name != "crashes_always":
        assert case.result() == played["undisturbed"][0].result()


CLUSTER_FAULTS: dict[str, tuple[Callable[[Case], None], dict[str, Any]]] = {
    "preempted_warned": (preempted_with_time, {}),
    "preempted_warned_at_once": (preempted, {"partition": "low_at_once"}),
    "preempted_with_grace": (preempted_with_time, {}),
    "preempted_at_once": (preempted, {"partition": "low_at_once"}),
    "controller_restarted": (controller_restarted, {"seconds": 0.3}),
    "controller_away": (controller_away, {"seconds": 0.3}),
    "node_down": (node_down, {}),
    "node_seems_dead": (node_seems_dead, {"seconds": 1.5, "later_seconds": 0.1}),
    "node_dies": (node_dies, {}),
}
WITHOUT_USER_SIGNAL = ("preempted_with_grace", "preempted_at_once")


@pytest.mark.slow
@pytest.mark.parametrize("name", CLUSTER_FAULTS)
def test_fault_of_the_cluster(
    name: str, played: Played, slurm_cluster: Any, toy: Any, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    fault, options = CLUSTER_FAULTS[name]
    line = "SlurmctldParameters=preempt_send_user_signal"
    if name in WITHOUT_USER_SIGNAL:
        slurm_cluster.configure(line, f"#{line}")
        request.addfinalizer(lambda: slurm_cluster.configure(f"#{line}", line))
    if name in ("node_seems_dead", "node_dies") and "MUGS_ALL_FAULTS" not in os.environ:
        pytest.skip("waits minutes for Slurm to give a node up: MUGS_ALL_FAULTS=1 runs it")
    if name.startswith("node_") and not slurm_cluster.namespaces:
        pytest.skip("no namespaces on this machine: a node cannot be killed alone")
    case = Case(slurm_cluster, tmp_path, toy, name, **options)
    case.submit()
    fault(case)
    assert case.result() == played["undisturbed"][0].result()
