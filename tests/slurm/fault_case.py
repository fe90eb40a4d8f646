"""The toy training and its dependent on a cluster, as the faults see them."""

import contextlib
import json
import os
import signal
import time
import traceback
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import toy_training

from pipeline import attempts, manifest
from pipeline.files import read_json
from pipeline.identity import run_id
from pipeline.spec import Resources, StageRun
from slurm.shared import queue
from slurm.status import RunStatus, collect_status
from slurm.submission.profile import ClusterProfile
from slurm.submission.submit import submit


class Case:
    """One training and its dependent on the cluster, and what a fault needs to know of them."""

    def __init__(self, cluster: Any, folder: Path, name: str, **options: Any) -> None:
        self.cluster, self.name, self.root = cluster, name, folder / "runs"
        fields = {
            key: options.pop(key) for key in ("fault", "seconds", "later_seconds") if key in options
        }
        small = Resources(gpu=False, cpus_per_rank=1, hours=0.5, memory_gb=1)
        need = {key: options.pop(key) for key in Resources.model_fields if key in options}
        cfg = toy_training.Train(case=name, **fields)
        self.train = StageRun(
            "train",
            name,
            run_id("train", cfg, {}),
            cfg,
            {},
            small.model_copy(update=need),
            "toy_training:train",
        )
        below = {"weights": self.train.run_id}
        self.digest = StageRun(
            "digest",
            name,
            run_id("digest", toy_training.Digest(), below),
            toy_training.Digest(),
            below,
            small,
            "toy_training:digest",
        )
        self.runs = [self.train, self.digest]
        self.run_dir = self.train.run_dir(self.root)
        options = {"partition": "low", "signal_delay_s": 30, **options}
        self.profile = ClusterProfile(run_root=self.root, **options)

    def submit(self) -> None:
        """Queue both."""
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
        return collect_status(self.runs, self.root)

    def until(self, true: Callable[[], Any], what: str, timeout_s: float = 240) -> None:
        """Wait for a condition."""
        end = time.monotonic() + timeout_s
        while not true():
            if time.monotonic() > end:
                raise AssertionError(
                    f"{self.name}: {what}: {self.facts()} {self.states()} {self.story()}"
                )
            time.sleep(0.1)

    def steps(self) -> int:
        """Steps begun so far, repeated ones included."""
        path = self.run_dir / "at"
        return path.read_bytes().count(b"\n") if path.exists() else 0

    def at_step(self, step: int) -> None:
        """Wait until so many steps were begun."""
        self.until(lambda: self.steps() >= step, f"step {step}")

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
        if not (self.run_dir / queue.JOB_NOTE).exists():
            return []
        found: list[int] = []
        job = f"SLURM_JOB_ID={self.job_id}".encode()
        for folder in Path("/proc").glob("[0-9]*"):
            with contextlib.suppress(OSError):
                command = (folder / "cmdline").read_bytes().replace(b"\0", b" ").decode()
                ours = (
                    job in (folder / "environ").read_bytes().split(b"\0")
                    or f"[{self.job_id}." in command
                )
                if ours and mark in command and not command.startswith("srun"):
                    found.append(int(folder.name))
        return found

    def kill(self, mark: str) -> None:
        """Kill -9 those."""
        found = self.processes(mark)
        assert found, f"no process {mark} of job {self.job_id}"
        for pid in found:
            os.kill(pid, signal.SIGKILL)

    def finish(self, timeout_s: float = 240) -> None:
        """Wait until both are done."""
        self.until(lambda: {s.state for s in self.states()} == {"done"}, "done", timeout_s)

    def survives(self, step: int, act: Callable[[], object]) -> None:
        """Act once so many steps were begun: the training starts a second time and ends well."""
        self.at_step(step)
        act()
        self.finish()
        assert self.attempts() == 2

    def attempts(self) -> int:
        """How often the training was started."""
        return attempts.latest_attempt(self.run_dir)

    def result(self) -> tuple[str, Any]:
        """The digest, and the checksums of the last checkpoint."""
        entry = manifest.find_done(self.root, self.digest.run_id)
        assert entry is not None, self.name
        last = self.run_dir / "checkpoints" / f"step_{self.train.config.steps:08d}"
        return entry.output("digest").read_text(), read_json(last / "state.json")["files"]

    def story(self) -> str:
        """The logs' last lines, for a message."""
        logs = sorted((self.run_dir / "logs").glob("*"))
        return "\n".join(f"--- {p.name}\n{p.read_text(errors='replace')[-1500:]}" for p in logs)


Fault = Callable[[Case], None]
Played = dict[str, tuple[Case, str]]


def play(cases: dict[str, Case], faults: dict[str, Fault], at_once: int) -> Played:
    """Each case with its fault, some at once; the case and what went wrong."""

    def one(name: str) -> str:
        try:
            cases[name].submit()
            faults[name](cases[name])
        except BaseException:
            return traceback.format_exc()
        return ""

    with ThreadPoolExecutor(at_once) as pool:
        return {
            name: (cases[name], wrong)
            for name, wrong in zip(cases, pool.map(one, cases), strict=True)
        }
