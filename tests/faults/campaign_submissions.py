"""Campaign: many submissions of one plan at once, some killed at random;
each run is queued exactly once.

Slurm is three shell scripts around a file under a lock;
jobs start and finish while the submissions are under way.
"""

# ruff: noqa: E402

import fcntl
import os
import random
import shutil
import signal
import sys
import tempfile
import threading
import time
from collections import Counter
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

from commands import write_commands
from forked import answer, in_own_process
from outcome import Outcome

from pipeline import attempts, config, manifest
from pipeline.plan import build_plan
from pipeline.spec import StageRun
from slurm.shared.queue import job_name
from slurm.submission.profile import ClusterProfile
from slurm.submission.submit import submit
from stages import STAGES

NAME = "7_submissions"
SBATCH = """exec 9>"$FAKE/lock"; flock 9
id=$(cat "$FAKE/next"); echo $((id + 1)) > "$FAKE/next"
name=${2#--job-name=}
wait=$(sed -n 's/^#SBATCH --dependency=//p' | tr -d "'")
echo "$id|$name|PENDING|Dependency|$wait|$(id -u)|(null)|${3#--comment=}" >> "$FAKE/queue"
echo "$name" >> "$FAKE/submitted"
flock -u 9
sleep 0.0$(($$ % 10))
echo $id
"""
SQUEUE = 'exec 9>"$FAKE/lock"; flock -s 9; cat "$FAKE/queue"'
SCANCEL = 'echo "$@" >> "$FAKE/cancelled"'


class FakeSlurm:
    """The scripts, and the jobs that they hold: `step` lets a random one that may run finish."""

    def __init__(self, folder: Path, runs: list[StageRun], run_root: Path, seed: int) -> None:
        self.folder, self.runs, self.run_root = folder, runs, run_root
        self.random = random.Random(seed)
        write_commands(folder / "bin", sbatch=SBATCH, squeue=SQUEUE, scancel=SCANCEL, srun="")
        (folder / "next").write_text("100\n")
        for name in ("queue", "submitted", "cancelled"):
            (folder / name).touch()

    def submitted(self) -> Counter[str]:
        """How often each job name was given to sbatch."""
        return Counter((self.folder / "submitted").read_text().split())

    def step(self) -> None:
        """Finish one job whose inputs are done: the manifest entry first,
        then it leaves the queue.
        """
        with (self.folder / "lock").open("a") as lock:
            fcntl.flock(lock, fcntl.LOCK_SH)
            lines = (self.folder / "queue").read_text().splitlines()
        names = {job_name(run.run_dir(self.run_root)): run for run in self.runs}
        for line in self.random.sample(lines, len(lines)):
            run = names[line.split("|")[1]]
            if all(manifest.find_done(self.run_root, need) for need in run.needs.values()):
                entry = manifest.ManifestEntry(
                    stage=run.stage,
                    name=run.name,
                    run_id=run.run_id,
                    attempt=attempts.start_attempt(run.run_dir(self.run_root)),
                    info={"text": "x" * 20000},
                )
                manifest.record_entry(self.run_root, entry)
                with (self.folder / "lock").open("a") as lock:
                    fcntl.flock(lock, fcntl.LOCK_EX)
                    kept = [
                        x for x in (self.folder / "queue").read_text().splitlines() if x != line
                    ]
                    (self.folder / "queue").write_text("".join(f"{x}\n" for x in kept))
                return


def play(seed: int, submissions: int) -> str | None:
    """One round; None, or what was wrong."""
    folder, rng = Path(tempfile.mkdtemp(prefix="submissions-")), random.Random(seed)
    runs = build_plan(config.load_reproduction("mini", STAGES))
    profile = ClusterProfile(run_root=folder / "runs", python="/usr/bin/python3")
    slurm = FakeSlurm(folder / "slurm", runs, profile.run_root, seed)
    os.environ["FAKE"] = str(slurm.folder)
    path, os.environ["PATH"] = os.environ["PATH"], f"{slurm.folder}/bin:{os.environ['PATH']}"
    reader = Reader(profile.run_root, runs)
    reader.start()
    try:
        errors = _storm(runs, profile, slurm, submissions, rng)
        _submit(runs, profile, folder / "last.err")
    finally:
        os.environ["PATH"] = path
        reader.ended.set()
        reader.join()
    submitted = slurm.submitted()
    counts = {run.name: submitted[job_name(run.run_dir(profile.run_root))] for run in runs}
    wrong = [] if set(counts.values()) == {1} else [f"sbatch calls: {counts}"]
    wrong += errors + reader.wrong
    wrong += [
        f"cancelled {text}" for text in [(slurm.folder / "cancelled").read_text().strip()] if text
    ]
    if not wrong:
        shutil.rmtree(folder)
    return f"round {seed}, {folder}: {'; '.join(wrong)}" if wrong else None


def _submit(runs: list[StageRun], profile: ClusterProfile, errors: Path) -> None:
    try:
        submit(runs, profile)
    except Exception as error:
        errors.write_text(f"{type(error).__name__}: {error}")


def _storm(
    runs: list[StageRun],
    profile: ClusterProfile,
    slurm: FakeSlurm,
    submissions: int,
    rng: random.Random,
) -> list[str]:
    """Submissions that start within a moment; about a third are killed,
    alone or with the sbatch they called.
    """
    pids: list[int] = []
    for index in range(submissions):
        pid = os.fork()
        if pid == 0:
            os.setsid()
            time.sleep(rng.random() * 0.5 if index else 0)
            _submit(runs, profile, slurm.folder / f"{index}.err")
            os._exit(0)
        rng.random()
        pids.append(pid)
    began = time.monotonic()
    strikes = sorted(
        (rng.uniform(0, 6), rng.choice(pids), rng.random() < 0.5) for _ in range(submissions // 3)
    )
    alive = set(pids)
    while alive:
        while strikes and time.monotonic() - began > strikes[0][0]:
            _, pid, group = strikes.pop(0)
            if pid in alive:
                (os.killpg if group and os.getpgid(pid) == pid else os.kill)(pid, signal.SIGKILL)
        if rng.random() < 0.02:
            slurm.step()
        alive -= {pid for pid in alive if os.waitpid(pid, os.WNOHANG)[0]}
        time.sleep(0.005)
    return [path.read_text() for path in slurm.folder.glob("*.err")]


class Reader(threading.Thread):
    """Reads every manifest entry all the time; each is absent or whole."""

    def __init__(self, run_root: Path, runs: list[StageRun]) -> None:
        super().__init__(daemon=True)
        self.run_root, self.ids = run_root, [run.run_id for run in runs]
        self.ended = threading.Event()
        self.wrong: list[str] = []

    def run(self) -> None:
        """Until `ended`."""
        while not self.ended.wait(0.001):
            for path in [manifest.entry_path(self.run_root, run_id) for run_id in self.ids]:
                try:
                    manifest.parse_entry(path.read_bytes())
                except FileNotFoundError:
                    continue
                except ValueError as error:
                    self.wrong.append(f"{path}: {error}")


def run(rounds: int = 20, seed: int = 0, submissions: int = 50) -> Outcome:
    """The campaign at the given size."""
    return in_own_process(__file__, rounds, seed, submissions)


if __name__ == "__main__":
    rounds, seed, count = (int(text) for text in sys.argv[2:])
    outcome = Outcome(NAME, rounds)
    for number in range(rounds):
        wrong = play(seed * 1000 + number, count)
        outcome.expect(wrong is None, str(wrong))
    outcome.note = (
        f"{count} submissions at once of a plan of 5 runs, a third killed, "
        f"jobs ending meanwhile, seed {seed}"
    )
    answer(outcome)
