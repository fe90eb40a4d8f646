"""Campaign: a small pretraining of each method, interrupted at random steps,
ends with the same state and the same sample stream.

Ranks are forked from a process that has imported everything, so that a start costs no imports.
"""

# ruff: noqa: E402

import importlib
import os
import random
import shutil
import signal
import sys
import tempfile
import time
import zlib
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

os.environ["OMP_NUM_THREADS"] = "1"
ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

from forked import answer, in_own_process
from outcome import Outcome
from processes import free_port

from mugs.methods.config import METHODS
from pipeline import config, manifest, runfile
from pipeline.files import read_json
from pipeline.plan import build_plan
from pipeline.spec import StageRun
from stages import STAGES

NAME = "1_interruptions"
STEPS = 24
SETS = (
    "epochs=2", f"steps_per_epoch={STEPS // 2}", "warmup_epochs=1", "batch_size=8",
    "checkpoint_steps=5", "log_steps=1",
)  # fmt: skip
# Queue and memory come round within these steps.
SMALLER = {"mugs": ("queue_size=48", "memory_size=40")}
KINDS = {
    "usr2": signal.SIGUSR2,
    "term": signal.SIGTERM,
    "kill_rank": signal.SIGKILL,
    "kill_job": signal.SIGKILL,
}
IMPORTED = (
    "mugs.pretrain.train",
    "mugs.methods",
    "mugs.weights.backbone_file",
    "slurm.node.job",
    "stages.pretrain",
)
# A start on a busy machine has taken two minutes.
PATIENCE_S = 600.0


@dataclass
class Start:
    """One start of the run: its ranks' processes and, once they ended, their exit codes."""

    pids: list[int]
    codes: dict[int, int] = field(default_factory=dict)

    def poll(self) -> bool:
        """Whether all ranks have ended."""
        for pid in set(self.pids) - set(self.codes):
            ended, status = os.waitpid(pid, os.WNOHANG)
            if ended:
                self.codes[pid] = os.waitstatus_to_exitcode(status)
        return len(self.codes) == len(self.pids)

    def signal(self, number: int, pids: Iterable[int]) -> None:
        """Send a signal to those that are still there."""
        for pid in set(pids) - set(self.codes):
            os.kill(pid, number)


def plan_pretraining(method: str, sets: Iterable[str]) -> tuple[StageRun, StageRun]:
    """Return the first pretraining of a method in mini_methods, with these settings, and its data.

    Stochastic depth is on, as its draws have to be the same after a restart.
    """
    runs = config.load_reproduction("mini_methods", STAGES).runs
    names = [name for name, run in runs.items() if getattr(run.config, "method", "") == method]
    assert names, f"{method} has no pretraining in mini_methods, so nothing interrupts it"
    own = [f"{method}.{item}" for item in ("drop_path=0.1", *SMALLER.get(method, ()))]
    overrides = [f"{names[0]}.{item}" for item in (*sets, *own)]
    planned = build_plan(config.load_reproduction("mini_methods", STAGES, overrides))
    by_name = {run.name: run for run in planned}
    return by_name[names[0]], by_name["digits"]


class Campaign:
    """A folder with the converted data set, and the states that undisturbed runs end with."""

    def __init__(
        self,
        folder: Path,
        seed: int,
        *,
        ranks: tuple[int, ...] = (1, 2),
        methods: tuple[str, ...] = tuple(METHODS),
    ) -> None:
        self.folder, self.random, self.ranks = folder, random.Random(seed), ranks
        self.ends: Counter[str] = Counter()
        self.interruptions: Counter[str] = Counter()
        self.expected: dict[tuple[str, int], dict[str, Any]] = {}
        found = [plan_pretraining(method, SETS) for method in methods]
        self.pretrainings = dict(zip(methods, (run for run, _ in found), strict=True))
        digits = found[0][1]
        for module in IMPORTED:
            importlib.import_module(module)
        self._finish(self._start(runfile.write_run_file(folder, digits), 1))
        assert manifest.find_done(folder, digits.run_id) is not None

    def _run(self, method: str, name: str) -> StageRun:
        run_id = f"{zlib.crc32(name.encode()):012x}"
        return replace(self.pretrainings[method], name=name, own_name=name, run_id=run_id)

    def _undisturbed(self, method: str, count: int) -> dict[str, Any]:
        """Files and samples of a run without interruption, made when they are first asked for."""
        if (method, count) not in self.expected:
            self.expected[method, count] = self._run_undisturbed(method, count)
        return self.expected[method, count]

    def _run_undisturbed(self, method: str, count: int) -> dict[str, Any]:
        run = self._run(method, f"straight_{method}_{count}")
        run_dir = runfile.write_run_file(self.folder, run)
        codes = self._finish(self._start(run_dir, count))
        assert set(codes) == {0}, (run_dir / "log").read_text()[-3000:]
        return {"files": final_files(run_dir), "stream": stream(run_dir)}

    def _start(self, run_dir: Path, count: int) -> Start:
        """Fork the ranks of one start."""
        port, launch = free_port(), f"trial-{time.monotonic_ns()}"
        pids = []
        for rank in range(count):
            pid = os.fork()
            if pid == 0:
                _become_rank(run_dir, rank, count, port, launch)
            pids.append(pid)
        return Start(pids)

    def _finish(self, start: Start, grace_s: float = PATIENCE_S) -> list[int]:
        """Wait for all ranks; a few seconds after the first bad end the others are killed,
        as executors do.
        """
        end = time.monotonic() + grace_s
        while not start.poll():
            if start.codes and any(start.codes.values()):
                end = min(end, time.monotonic() + 5)
            if time.monotonic() > end:
                start.signal(signal.SIGKILL, start.pids)
            time.sleep(0.005)
        return list(start.codes.values())

    def trial(self, number: int) -> str | None:
        """One run with one to three random interruptions; None, or what was wrong."""
        count = self.random.choice(self.ranks)
        # In turn, so that each has as many trials.
        method = list(self.pretrainings)[number % len(self.pretrainings)]
        run = self._run(method, f"trial{number}")
        run_dir = runfile.write_run_file(self.folder, run)
        story, wrong = [], "an exception"
        try:
            for _ in range(self.random.randint(1, 3)):
                story.append(self._interrupt(run_dir, count))
                self.interruptions[method] += 1
            codes = self._finish(self._start(run_dir, count))
            wrong = self._compare(run, run_dir, self._undisturbed(method, count), codes) or ""
            return f"{method}, {count} ranks, {', '.join(story)}: {wrong}" if wrong else None
        finally:
            if not wrong:
                shutil.rmtree(run_dir)

    def _interrupt(self, run_dir: Path, count: int) -> str:
        """Start, wait for a random step and a random part of the next, and strike."""
        kind, after = self.random.choice(list(KINDS)), self.random.randint(0, STEPS - 2)
        delay = self.random.uniform(0, 0.05)
        before = lines(run_dir)
        start, end = self._start(run_dir, count), time.monotonic() + PATIENCE_S
        while not start.poll() and lines(run_dir) - before < after and time.monotonic() < end:
            time.sleep(0.002)
        time.sleep(delay)
        struck = [self.random.choice(start.pids)] if kind == "kill_rank" else start.pids
        start.signal(KINDS[kind], struck)
        codes = self._finish(start)
        how = "came too late"
        if any(codes):
            how = "saved" if 75 in codes else "lost steps"
        self.ends[f"{kind} {how}"] += 1
        return f"{kind} after {after} steps and {1000 * delay:.0f} ms {codes}"

    def _compare(
        self, run: StageRun, run_dir: Path, expected: dict[str, Any], codes: list[int]
    ) -> str | None:
        if set(codes) != {0} or manifest.find_done(self.folder, run.run_id) is None:
            return f"not finished, exit codes {codes}, see {run_dir}/log"
        if (files := final_files(run_dir)) != expected["files"]:
            differing = sorted(k for k in files if files[k] != expected["files"].get(k))
            return f"final state differs in {differing}"
        if (seen := stream(run_dir)) != expected["stream"]:
            steps = set(seen.items()) ^ set(expected["stream"].items())
            return f"sample stream differs at {steps}"
        return None


def _become_rank(run_dir: Path, rank: int, count: int, port: int, launch: str) -> None:
    """In the forked process: be one rank, note which samples each step got, and never return."""
    log = os.open(run_dir / "log", os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
    os.dup2(log, 1)
    os.dup2(log, 2)
    ports = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "MUGS_LAUNCH": launch}
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(count), **ports)
    code = 1
    try:
        from mugs.engine.step_log import StepLog
        from slurm.node import job

        plain = StepLog.record_step

        def record(self: StepLog, step: int, result: Any, ids: Any, waited: float) -> None:
            with (run_dir / f"stream{rank}").open("a") as file:
                file.write(f"{step} {zlib.crc32(ids.numpy().tobytes())}\n")
            plain(self, step, result, ids, waited)

        StepLog.record_step = record  # type: ignore[method-assign]
        code = job.main([str(run_dir)])
    finally:
        os._exit(code)


def lines(run_dir: Path) -> int:
    """Steps taken so far, repeated ones included."""
    path = run_dir / "stream0"
    return path.read_bytes().count(b"\n") if path.exists() else 0


def stream(run_dir: Path) -> dict[tuple[str, str], set[str]]:
    """(rank, step) -> the checksums of the samples it ever got: one."""
    seen: dict[tuple[str, str], set[str]] = {}
    for path in run_dir.glob("stream*"):
        for line in path.read_text().splitlines():
            step, checksum = line.split()
            seen.setdefault((path.name, step), set()).add(checksum)
    return {key: frozenset(values) for key, values in seen.items()}  # type: ignore[misc]


def final_files(run_dir: Path) -> dict[str, Any]:
    """SHA-256 of the files of the last checkpoint and of the exported weights."""
    state = read_json(run_dir / "checkpoints" / f"step_{STEPS:08d}" / "state.json") or {}
    return {
        **{name: facts["sha256"] for name, facts in state.get("files", {}).items()},
        **{path.name: manifest.hash_path(path) for path in (run_dir / "weights").glob("*")},
    }


def run(trials: int = 200, seed: int = 0, methods: str = ",".join(METHODS)) -> Outcome:
    """The campaign at the given size."""
    return in_own_process(__file__, trials, seed, methods)


def play(trials: int, seed: int, methods: str) -> Outcome:
    """The trials, in this process."""
    folder = Path(tempfile.mkdtemp(prefix="interruptions-"))
    campaign = Campaign(folder, seed, methods=tuple(methods.split(",")))
    outcome = Outcome(NAME, trials)
    for number in range(trials):
        if wrong := campaign.trial(number):
            outcome.expect(False, f"trial {number}: {wrong}")
            sys.stderr.write(f"trial {number}: {wrong}\n")
    if not outcome.complaints:
        shutil.rmtree(folder)
    ends = ", ".join(f"{times} {how}" for how, times in sorted(campaign.ends.items()))
    struck = ", ".join(f"{times} of {method}" for method, times in campaign.interruptions.items())
    outcome.note = (
        f"runs of the methods in turn, 1-3 interruptions each ({struck}) at random of {STEPS} "
        f"steps, 1 and 2 ranks, fp32, seed {seed}: {ends}"
    )
    return outcome


if __name__ == "__main__":
    answer(play(int(sys.argv[2]), int(sys.argv[3]), sys.argv[4]))
