"""Campaign: EIO and ESTALE at 3% of the file calls of every command. Each says so in one line,
loses nothing, and does its work when it is called again.
"""

import random
import re
import tempfile
from collections.abc import Collection
from pathlib import Path

from called import Called, fast_surroundings
from commands_of_users import (
    CHANGING,
    COMPARED,
    DRAWING,
    READING,
    WRITING,
    Command,
    Stage,
    run_command,
)
from outcome import Outcome
from stumbles import stumbling

NAME = "9e_stumbling_disk"
COMMANDS = {**COMPARED, **READING, **WRITING, **CHANGING}
TEMPORARY = re.compile(r"\..+\.[0-9a-f]{8}\.tmp")
# The folder of one `clean` in the trash.
ONE_CLEAN = re.compile(r"(\.trash-\d+)/[^/]+/")


def read_tree(folder: Path) -> dict[str, bytes]:
    """Files by their paths, without temporary ones; what is in the trash, whenever it came."""
    found = {}
    for path in sorted(folder.rglob("*")):
        name = ONE_CLEAN.sub(r"\1/", path.relative_to(folder).as_posix())
        temporary = any(TEMPORARY.fullmatch(part) for part in Path(name).parts)
        if path.is_file() and (not temporary or ".trash-" in name):
            found[name] = path.read_bytes()
    return found


def find_lost(before: dict[str, bytes], after: dict[str, bytes]) -> list[str]:
    """Files whose content is nowhere any more."""
    left = set(after.values())
    return [
        name
        for name, content in before.items()
        if content not in left and "report.html" not in name
    ]


def complain(called: Called, stumbled: int) -> str:
    """What is wrong with how a command ended that met errors of the disk; "" if nothing is."""
    if called.complaint:
        return called.complaint
    errors = [line for line in called.err.splitlines() if line.startswith("error: ")]
    if called.code == 2 and len(errors) != 1:
        return f"exit code 2 with {len(errors)} lines of error: {called.err[-300:]}"
    if called.code and not stumbled:
        return f"exit code {called.code}, though nothing failed: {called.err[-300:]}"
    return ""


class Expected:
    """What each command makes of the scene if the disk does not fail."""

    def __init__(self, stage: Stage) -> None:
        self.stage = stage
        self.trees: dict[str, dict[str, bytes]] = {}
        self.said: dict[str, Called] = {}

    def find(self, name: str, command: Command) -> tuple[dict[str, bytes], Called]:
        """The files after a command, and what it printed."""
        if name not in self.trees:
            with self.stage.copied() as scene:
                self.said[name] = run_command(scene, command)
                self.trees[name] = read_tree(scene.folder)
        return self.trees[name], self.said[name]


def play_one(stage: Stage, expected: Expected, name: str, command: Command, seed: int) -> str:
    """One trial; what was wrong, or ""."""
    tree, calm = expected.find(name, command)
    with stage.copied() as scene:
        before = read_tree(scene.folder)
        with stumbling(scene.folder, random.Random(seed)) as stumbles:
            called = run_command(scene, command)
        if complaint := complain(called, stumbles.count or calm.code):
            return complaint
        emptied = name == "clean --empty-trash"
        if lost := [x for x in find_lost(before, read_tree(scene.folder)) if not emptied]:
            return f"lost {lost} ({called.out} {called.err})"
        again = run_command(scene, command)
        if again.complaint or again.code != calm.code:
            return f"called again: {again.code}, {again.complaint or again.err[-300:]}"
        return describe_difference(read_tree(scene.folder), tree)


def describe_difference(now: dict[str, bytes], calm: dict[str, bytes]) -> str:
    """Which files differ from those of an undisturbed command; "" if none does."""
    differ = sorted(name for name in now.keys() | calm.keys() if now.get(name) != calm.get(name))
    return f"other files than of an undisturbed command: {differ}" if differ else ""


def play(
    outcome: Outcome,
    folder: Path,
    times: int,
    seed: int = 0,
    *,
    names: Collection[str] = (*COMMANDS, *DRAWING),
) -> None:
    """Each of these commands so many times."""
    commands = {name: {**COMMANDS, **DRAWING}[name] for name in names}
    with fast_surroundings():
        stage = Stage(folder)
        expected = Expected(stage)
        for trial in range(times):
            for number, (name, command) in enumerate(commands.items()):
                own = seed + 1000 * trial + number
                outcome.trials += 1
                complaint = play_one(stage, expected, name, command, own)
                outcome.expect(not complaint, f"{name}, seed {own}: {complaint}")


def run(times: int = 12) -> Outcome:
    """The campaign at full size."""
    outcome = Outcome(NAME)
    with tempfile.TemporaryDirectory() as folder:
        play(outcome, Path(folder), times)
    outcome.note = f"EIO, ESTALE at 3% of the file calls of {len(COMMANDS) + len(DRAWING)} commands"
    return outcome
