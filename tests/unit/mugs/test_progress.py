"""The file of a training's progress never holds up the training."""

import json
import threading
from contextlib import closing
from pathlib import Path
from types import SimpleNamespace

import pytest

from mugs.engine import progress as module
from mugs.engine.progress import Progress


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> SimpleNamespace:
    """A clock that stands still."""
    clock = SimpleNamespace(now=0.0)
    clock.monotonic = clock.time = lambda: clock.now
    monkeypatch.setattr(module, "time", clock)
    return clock


def test_steps_do_not_wait_for_a_slow_disk(
    tmp_path: Path, clock: SimpleNamespace, monkeypatch: pytest.MonkeyPatch
) -> None:
    released, written = threading.Event(), []

    def write(path: Path, text: str) -> None:
        released.wait()
        written.append((threading.current_thread().name, json.loads(text)["done"]))

    monkeypatch.setattr(module, "write_atomic", write)
    with closing(Progress("run", 9, path=tmp_path / "x.json", in_background=True)) as progress:
        for done in range(1, 9):
            clock.now = float(2 * done)
            progress.update(done)
        # The disk hangs since the first step.
        assert written == []
        released.set()
        progress.update(9)
    assert [done for _, done in written] == [1, 9]
    assert all(name.startswith("progress") for name, _ in written)


def test_an_error_of_the_disk_surfaces(
    tmp_path: Path, clock: SimpleNamespace, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(path: Path, text: str) -> None:
        raise OSError("no space left on device")

    monkeypatch.setattr(module, "write_atomic", fail)
    with closing(Progress("run", 9, path=tmp_path / "x.json", in_background=True)) as progress:
        clock.now = 2.0
        progress.update(1)
        with pytest.raises(OSError, match="no space"):
            progress.update(9)


def test_the_file_of_a_loop_on_one_rank_is_there_at_once(
    tmp_path: Path, clock: SimpleNamespace
) -> None:
    with closing(Progress("run", 9, path=tmp_path / "x.json")) as progress:
        clock.now = 2.0
        progress.update(4)
        assert json.loads((tmp_path / "x.json").read_text())["done"] == 4
