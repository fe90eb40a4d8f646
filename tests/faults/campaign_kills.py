"""Campaign: commands that change files, killed at a random moment. Called again, each ends with the
same files as if it had not been killed.
"""

# ruff: noqa: E402

import os
import random
import signal
import sys
import tempfile
import time
from pathlib import Path

# A forked process has none of the threads that torch computes with, and would wait for them.
os.environ["OMP_NUM_THREADS"] = "1"
ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

import processes
from called import fast_surroundings
from campaign_stumbles import find_lost, read_tree
from commands_of_users import CHANGING, DRAWING, WRITING, Command, Stage, run_command
from forked import answer, in_own_process
from outcome import Outcome
from scene import OLD, Scene

NAME = "9c_kills_of_commands"
COMMANDS: dict[str, Command] = {
    "clean --yes": CHANGING["clean --yes"],
    "tables --publish": WRITING["tables --publish"],
    "report": DRAWING["report"],
    "verify --repair": CHANGING["verify --repair"],
    "export": WRITING["export"],
}


def need_repair(scene: Scene) -> None:
    """Damage a checkpoint, and leave half of another one."""
    checkpoints = scene.runs()["other"].run_dir(scene.root) / "checkpoints"
    (checkpoints / "step_00000002/student.safetensors").write_bytes(b"damaged")
    for number in range(5):
        half = checkpoints / f".step_{number + 3:08d}.0123456{number}.tmp"
        half.mkdir()
        (half / "student.safetensors").write_bytes(b"half")
        for path in (half / "student.safetensors", half):
            os.utime(path, (OLD, OLD))


def run_in_a_process(scene: Scene, command: Command) -> int:
    """Start a process that calls a command; its id. It ends with 1 if the command complains."""
    return processes.start(lambda: int(bool(run_command(scene, command).complaint)))


class Calm:
    """What a command makes if nobody kills it, and how long it takes."""

    def __init__(self, stage: Stage, command: Command) -> None:
        with stage.copied() as scene:
            need_repair(scene)
            began = time.monotonic()
            assert processes.end(run_in_a_process(scene, command)) == 0
            self.seconds = time.monotonic() - began
            self.tree = read_tree(scene.folder)


def play_one(stage: Stage, calm: Calm, command: Command, rng: random.Random) -> tuple[bool, str]:
    """One trial: whether the command was still running when it was killed, and what was wrong."""
    with stage.copied() as scene:
        need_repair(scene)
        before = read_tree(scene.folder)
        process = run_in_a_process(scene, command)
        time.sleep(rng.uniform(0, calm.seconds))
        os.kill(process, signal.SIGKILL)
        killed = processes.end(process) == -signal.SIGKILL
        # Half of what is written is no loss, and a damaged checkpoint keeps its content.
        if lost := find_lost(before, read_tree(scene.folder)):
            return killed, f"lost {lost}"
        if code := processes.end(run_in_a_process(scene, command)):
            return killed, f"called again: exit code {code}"
        tree = read_tree(scene.folder)
        differ = sorted(
            x for x in tree.keys() | calm.tree.keys() if tree.get(x) != calm.tree.get(x)
        )
        return killed, f"other files than without a kill: {differ}" if differ else ""


def play(outcome: Outcome, folder: Path, times: int, seed: int = 0, *, draw: bool = True) -> None:
    """Each command so many times; `draw`: the report too, which takes seconds."""
    killed = 0
    with fast_surroundings():
        stage = Stage(folder)
        for number, (name, command) in enumerate(COMMANDS.items()):
            if name in DRAWING and not draw:
                continue
            run_command(stage.scene, lambda s: ("plan", s.reproduction))
            calm = Calm(stage, command)
            for trial in range(times):
                own = seed + 1000 * number + trial
                struck, complaint = play_one(stage, calm, command, random.Random(own))
                outcome.trials += 1
                killed += struck
                outcome.expect(not complaint, f"{name}, seed {own}: {complaint}")
    outcome.note = (
        f"{killed} of them while it ran; the same command again then gives the same files"
    )


def run(times: int = 12, seed: int = 0) -> Outcome:
    """The campaign at full size: 60 kills."""
    return in_own_process(__file__, times, seed)


if __name__ == "__main__":
    outcome = Outcome(NAME)
    with tempfile.TemporaryDirectory() as folder:
        play(outcome, Path(folder), int(sys.argv[2]), int(sys.argv[3]))
    answer(outcome)
