"""A place where a file made to do harm is used as a user would, and what it did there."""

import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from checkpoint_cases import save
from tiny_stage import tiny_run

from mugs.checkpoint.record import CheckpointError
from mugs.weights.pickle_file import WeightsError
from pipeline.spec import ConfigError

REFUSALS = (CheckpointError, WeightsError, ConfigError, ValueError)


STARTS = ("os.system", "os.exec", "os.posix_spawn", "subprocess.Popen", "shutil.rmtree")


class Watch:
    """Opened files and started programs while it is on;
    an audit hook cannot be taken away again.
    """

    def __init__(self) -> None:
        self.on, self.opened, self.started = False, list[str](), list[str]()
        sys.addaudithook(self._hook)

    def _hook(self, event: str, arguments: tuple[Any, ...]) -> None:
        if self.on and event == "open":
            self.opened.append(str(arguments[0]))
        elif self.on and event in STARTS:
            self.started.append(event)


WATCH = Watch()


class Place:
    """A run root, and beside it a folder that nothing may touch: `secret` holds good files,
    `fuse` is never made.
    """

    def __init__(self, folder: Path) -> None:
        self.root, self.outside, self.fuse = folder / "root", folder / "outside", folder / "fuse"
        self.outside.mkdir(parents=True)
        (self.outside / "secret.txt").write_text("secret")
        save(self.outside, 7)
        self.secret = self.outside / "step_00000007"
        self.run = tiny_run()
        self.folder = self.run.run_dir(self.root)
        self.folder.mkdir(parents=True)


Case = Callable[[Place], Callable[[], object]]
"""Prepares a place and returns what a user then does, which must be refused or come to nothing."""


@contextmanager
def watched() -> Iterator[Watch]:
    """Note what is opened and started within the block."""
    WATCH.opened, WATCH.started = [], []
    WATCH.on = True
    try:
        yield WATCH
    finally:
        WATCH.on = False


def contents(folder: Path) -> Mapping[str, bytes]:
    """All files of a folder."""
    return {str(path): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


def harm(case: Case, folder: Path) -> tuple[str, float]:
    """What a malicious file did; nothing, when it was refused. And the seconds that took."""
    place = Place(folder)
    act = case(place)
    before, found = contents(place.outside), ""
    with watched() as watch:
        began = time.perf_counter()
        try:
            act()
            found = "not refused"
        except REFUSALS:
            pass
        except BaseException as error:
            found = f"not refused but failed: {type(error).__name__}: {error}"
        seconds = time.perf_counter() - began
    outside = [path for path in watch.opened if path.startswith(str(place.outside))]
    if place.fuse.exists() or watch.started:
        found = f"code ran: {watch.started}"
    elif outside:
        found = f"opened {outside}"
    elif contents(place.outside) != before:
        found = "files outside changed"
    return found, seconds
