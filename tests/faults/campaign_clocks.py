"""Campaign: clocks of hosts that are a day off, both ways. No run is blocked for ever, none is
queued twice, none is shown running that is dead, and nothing in use is removed.

The file server dates files; `time.time` is what is off, here and in the records of other hosts.
"""

import json
import os
import random
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any
from unittest.mock import patch

from called import answer_as_idle_slurm
from checkpoint_cases import save
from outcome import Outcome

from mugs.checkpoint.repair import inspect_checkpoints
from pipeline import attempts, runfile
from pipeline.files import write_json_atomic
from pipeline.run_root import mark_run_root
from pipeline.spec import StageRun
from slurm.shared.queue import SlurmError
from slurm.status import RunStatus, collect_status
from slurm.submission import submit as submission
from slurm.submission.lock import submission_lock
from slurm.submission.profile import ClusterProfile
from stages.commands.clean import clean_run_root

NAME = "9d_clocks"
DAY_S = 86400.0
HOUR_S = 3600.0
_real_time = time.time


@contextmanager
def clock_off(seconds: float) -> Iterator[None]:
    """Within the block, the clock of this host is so far ahead; that of the file server is not."""
    with patch("time.time", lambda: _real_time() + seconds):
        yield


def write_dated(path: Path, content: dict[str, Any], age_s: float, lead_s: float) -> None:
    """Write a record as a host did whose clock is ahead by `lead_s`, so many seconds ago."""
    now = _real_time()
    write_json_atomic(path, {**content, "time": now - age_s + lead_s})
    os.utime(path, (now - age_s, now - age_s))


class Case:
    """One trial: a run in a run root of its own, and leads of the clocks here and elsewhere."""

    def __init__(self, folder: Path, run: StageRun, rng: random.Random) -> None:
        self.root, self.run, self.rng = folder, run, rng
        self.here, self.there = (self.choose_lead() for _ in range(2))
        self.run_dir = runfile.write_run_file(folder, run)

    def choose_lead(self) -> float:
        """A day and some minutes ahead or behind, or right."""
        return self.rng.choice([-1, 0, 1]) * DAY_S + self.rng.uniform(-300, 300)

    def begin(self, age_s: float, job_id: str | None = None) -> None:
        """An attempt that another host started."""
        attempts.start_attempt(self.run_dir, job_id=job_id)
        number = attempts.latest_attempt(self.run_dir)
        path = self.run_dir / f"attempts/{number:04d}.json"
        write_dated(path, {"host": "node1", "pid": 1, "job_id": job_id}, age_s, self.there)

    def status(self) -> RunStatus:
        """What is shown here."""
        with clock_off(self.here):
            return collect_status([self.run], self.root)[0]

    def lock(self) -> str:
        """A lock of another host: kept while it is young, taken over when it is old."""
        old = self.rng.random() < 0.5
        age = self.rng.choice([660, 2 * HOUR_S, DAY_S, -DAY_S, 7 * DAY_S]) if old else 10.0
        holder = {"host": "login2", "pid": 1, "began": "1"}
        write_dated(self.run_dir / "claims/0001.json", holder, age, self.there)
        try:
            with clock_off(self.here), submission_lock(self.run_dir, 0.0):
                taken = True
        except SlurmError:
            taken = False
        return "" if taken == old else f"a lock {age:g} s old was{' not' * old} taken over"

    def sign_of_life(self) -> str:
        """A run on another machine without Slurm: running while it writes, else not."""
        alive = self.rng.random() < 0.5
        age = self.rng.uniform(0, 20) if alive else self.rng.choice([900, 2 * HOUR_S, 3 * DAY_S])
        self.begin(age + 60)
        progress = {"done": 3, "total": 9, "unit": "steps"}
        write_dated(self.run_dir / "progress.json", progress, age, self.there)
        found = self.status()
        shown = found.state == "running"
        return "" if shown == alive else f"wrote {age:.0f} s ago and is {found.state}"

    def newest_job(self) -> str:
        """A job after the attempt of another one; or one that began and failed."""
        began = self.rng.random() < 0.5
        login = self.choose_lead()
        self.begin(5000, "7")
        attempts.record_failure(self.run_dir, 1, error="OSError: old", log=self.run_dir / "x")
        write_dated(self.run_dir / "job.json", {"job_id": "8"}, 4000, login)
        if began:
            self.begin(3000, "8")
            attempts.record_failure(self.run_dir, 2, error="OSError: new", log=self.run_dir / "x")
        found = self.status()
        if began:
            return "" if "OSError: new" in found.detail else f"job 8 began and is {found}"
        fine = found.job_id == "8" and "old" not in found.detail
        return "" if fine else f"job 8 began nothing and is {found}"

    def clean(self) -> str:
        """A run that nobody asks for: removed unless it changed lately."""
        recent = self.rng.random() < 0.5
        age = self.rng.uniform(60, 3000) if recent else self.rng.choice([2 * HOUR_S, 9 * DAY_S])
        self._date(self.run_dir, age)
        mark_run_root(self.root)
        with clock_off(self.here):
            list(clean_run_root(self.root, set(), lambda folders: {}, yes=True))
        kept = self.run_dir.exists()
        return (
            "" if kept == recent else f"changed {age:.0f} s ago and {'stays' * kept or 'is gone'}"
        )

    def repair(self) -> str:
        """Half a checkpoint: removed unless it changed lately."""
        recent = self.rng.random() < 0.5
        age = self.rng.uniform(60, 3000) if recent else self.rng.choice([2 * HOUR_S, 9 * DAY_S])
        save(self.run_dir / "checkpoints", 1)
        half = self.run_dir / "checkpoints/.step_00000002.01234567.tmp"
        half.mkdir()
        (half / "student.safetensors").write_bytes(b"half")
        self._date(half, age)
        with clock_off(self.here):
            inspect_checkpoints(self.run_dir / "checkpoints", repair=True)
        kept = half.exists()
        return (
            "" if kept == recent else f"changed {age:.0f} s ago and {'stays' * kept or 'is gone'}"
        )

    def _date(self, folder: Path, age_s: float) -> None:
        for path in (*folder.rglob("*"), folder):
            os.utime(path, (_real_time() - age_s,) * 2)

    def submit(self) -> str:
        """Three hosts submit; between them, one dies with the lock, and the job may begin."""
        queued: list[str] = []
        profile = ClusterProfile(run_root=self.root, python="/usr/bin/python3")

        def answer(*command: str, **_: Any) -> tuple[int, str, str]:
            if command[0] == "squeue":
                return 0, "\n".join(queued), ""
            if command[0] != "sbatch":
                return answer_as_idle_slurm(*command)
            name = next(x for x in command if x.startswith("--job-name=")).partition("=")[2]
            comment = next(x for x in command if x.startswith("--comment=")).partition("=")[2]
            number = len(queued) + 8
            line = f"{number}|{name}|PENDING|Priority|(null)|{os.geteuid()}|(null)|{comment}"
            queued.append(line)
            return 0, str(number), ""

        for _ in range(3):
            with ExitStack() as stack:
                stack.enter_context(clock_off(self.choose_lead()))
                stack.enter_context(patch("slurm.shared.queue.call_slurm", answer))
                stack.enter_context(patch.object(submission, "take_snapshot", lambda _: self.root))
                stack.enter_context(patch.object(submission, "checking_lines", lambda _: []))
                submission.submit([self.run], profile)
            number = len(list((self.run_dir / "claims").glob("????.json"))) + 1
            holder = {"host": "login2", "pid": 1, "began": "1"}
            write_dated(self.run_dir / f"claims/{number:04d}.json", holder, 700, self.there)
        return "" if len(queued) == 1 else f"sbatch was called {len(queued)} times"


KINDS: tuple[Callable[[Case], str], ...] = (
    Case.lock,
    Case.sign_of_life,
    Case.newest_job,
    Case.clean,
    Case.repair,
    Case.submit,
)


def play(outcome: Outcome, folder: Path, trials: int, seed: int = 0) -> None:
    """Trials of all kinds in turn."""
    reproduction = folder / "scene.yaml"
    content = {"stage": "convert", "dataset": "x", "num_classes": 2, "resources": {"gpu": False}}
    reproduction.write_text(json.dumps({"name": "x", "runs": {"x": content}}))
    from stages.commands.reproduction import all_runs

    (run,) = all_runs(str(reproduction))
    with patch("slurm.shared.queue.call_slurm", answer_as_idle_slurm):
        for trial in range(trials):
            kind = KINDS[trial % len(KINDS)]
            case = Case(folder / str(trial), run, random.Random(seed + trial))
            outcome.trials += 1
            leads = f"here {case.here:.0f} s, there {case.there:.0f} s ahead"
            complaint = kind(case)
            outcome.expect(
                not complaint, f"{kind.__name__}, seed {seed + trial}, {leads}: {complaint}"
            )


def run(trials: int = 600) -> Outcome:
    """The campaign at full size."""
    outcome = Outcome(NAME)
    with tempfile.TemporaryDirectory() as folder:
        play(outcome, Path(folder), trials)
    kinds = ", ".join(kind.__name__ for kind in KINDS)
    outcome.note = f"clocks here and of other hosts a day ahead or behind: {kinds}"
    return outcome
