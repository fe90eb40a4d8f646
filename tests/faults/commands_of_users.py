"""The commands that the campaigns call, on the run root of a scene."""

import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from called import Called, call
from scene import Scene, build_scene

Command = Callable[[Scene], tuple[object, ...]]
# What these say of other runs must stay when the records of one are damaged.
COMPARED: dict[str, Command] = {
    "status --json": lambda s: ("status", s.reproduction, "--json"),
    "status --json of all": lambda s: ("status", "--json"),
    "tables --format csv": lambda s: ("tables", "--format", "csv", "--table", "1"),
    "clean": lambda s: ("clean", s.reproduction),
}
# These change nothing, and take a moment each.
READING: dict[str, Command] = {
    "status": lambda s: ("status", s.reproduction),
    "status of all": lambda s: ("status",),
    "plan": lambda s: ("plan", s.reproduction),
    "doctor": lambda s: ("doctor", s.reproduction),
    "tables --explain": lambda s: ("tables", "--explain", "table1", "mugs", "k-nn"),
    "tables --against": lambda s: ("tables", "--against", s.root, "--table", "1"),
    "logs": lambda s: ("logs", s.reproduction, "pretrain"),
    "logs of a stage": lambda s: ("logs", s.reproduction, "knn"),
    "verify": lambda s: ("verify", s.reproduction),
    "verify --deep": lambda s: ("verify", s.reproduction, "--deep"),
    "cancel": lambda s: ("cancel", s.reproduction),
    "diagnose": lambda s: ("diagnose", s.reproduction, "knn", "--records-only"),
}
# These write files elsewhere than in the folders of runs.
WRITING: dict[str, Command] = {
    "export": lambda s: ("export", "pretrain", "--out", s.folder / "w.pth"),
    "tables --publish": lambda s: ("tables", "--publish", s.folder / "published"),
    "tables --out": lambda s: ("tables", "--out", s.folder / "tables", "--table", "1"),
}
# These draw figures, which takes seconds.
DRAWING: dict[str, Command] = {
    "report": lambda s: ("report", s.reproduction),
    "report of all": lambda s: ("report",),
    "figures": lambda s: ("figures", "--out", s.folder / "figures"),
}
# These change the run root.
CHANGING: dict[str, Command] = {
    "verify --repair": lambda s: ("verify", s.reproduction, "--repair"),
    "clean --yes": lambda s: ("clean", s.reproduction, "--yes"),
    "clean --empty-trash": lambda s: ("clean", s.reproduction, "--yes", "--empty-trash"),
}


def run_command(scene: Scene, command: Command) -> Called:
    """Call a command on a run root."""
    arguments = command(scene)
    return call(*arguments, "--run-root", scene.root)


class Stage:
    """A scene of which each trial gets a copy at the same path, since records hold paths."""

    def __init__(self, folder: Path) -> None:
        self.kept = folder / "kept"
        self.scene = build_scene(folder / "scene")

    @contextmanager
    def copied(self) -> Iterator[Scene]:
        """Yield the scene as it was built; what happens to it in the block is undone."""
        self.scene.folder.rename(self.kept)
        try:
            yield Scene(self.kept).copy(self.scene.folder)
        finally:
            shutil.rmtree(self.scene.folder, ignore_errors=True)
            self.kept.rename(self.scene.folder)
