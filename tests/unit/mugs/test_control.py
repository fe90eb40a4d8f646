"""Stopping on request at a common step, resuming from there, and fencing of older attempts."""

import functools
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NoReturn

import pytest
import torch
from ranks import spawn

from mugs.checkpoint.record import CheckpointError, list_checkpoints, remove_leftovers
from mugs.checkpoint.save_load import SavePolicy, StateDicts, load_latest, save_checkpoint
from mugs.engine.control import StaleWriterError
from mugs.engine.loop import train


class Stopped(BaseException):
    """What the control of these tests leaves with."""


class Sum:
    """A training whose state is a number that depends on every step."""

    def __init__(self, total_steps: int) -> None:
        self.total_steps = total_steps
        self.value = torch.zeros(1, dtype=torch.float64)

    def steps(self, start: int) -> Iterator[None]:
        for step in range(start, self.total_steps):
            self.value = self.value * 1.5 + step
            yield

    def check_before_save(self) -> None:
        """There is nothing to check."""

    def state_dicts(self) -> StateDicts:
        return {"sum": {"value": self.value}}

    def metadata(self) -> dict[str, Any]:
        return {}

    def load_state(self, parts: StateDicts, notes: Mapping[str, Any]) -> None:
        self.value = parts["sum"]["value"]


class Asked:
    """Asked to stop from step `at` on; `newest` says whether no newer attempt has started."""

    def __init__(self, at: int = 10**9, attempt: int = 1) -> None:
        self.at, self.attempt, self.newest = at, attempt, True
        self.step = 0
        self.saves: list[int] = []

    def stop_requested(self) -> bool:
        return self.step >= self.at

    def may_write(self) -> bool:
        return self.newest

    def heartbeat(self, step: int) -> None:
        self.step = step

    def saved(self, step: int, seconds: float) -> None:
        assert seconds >= 0
        self.saves.append(step)

    def interrupted(self, step: int) -> NoReturn:
        raise Stopped(step)

    def finish(self) -> None:
        self.step = -1


def test_stops_where_it_is_asked_and_goes_on_from_there(tmp_path: Path) -> None:
    control = Asked(at=7)
    with pytest.raises(Stopped, match="7"):
        train(Sum(20), tmp_path, every=5, control=control)
    assert control.saves == [5, 7]
    again = Asked()
    task = Sum(20)
    train(task, tmp_path, every=5, control=again)
    assert (again.saves, again.step) == ([10, 15, 20], -1)
    assert task.value.item() == functools.reduce(lambda value, step: value * 1.5 + step, range(20))


def test_asked_after_the_last_step_is_done(tmp_path: Path) -> None:
    train(Sum(4), tmp_path, every=5, control=Asked(at=4))
    assert [p.name for p in list_checkpoints(tmp_path)] == ["step_00000004"]


def on_rank(rank: int, folder: Path) -> None:
    control = Asked(at=7) if rank == 1 else Asked()
    try:
        train(Sum(20), folder, every=50, control=control)
    except Stopped as stopped:
        (folder / f"stopped_{rank}").write_text(str(stopped))


def test_all_ranks_stop_after_the_same_step(tmp_path: Path) -> None:
    spawn(on_rank, 2, tmp_path)
    assert [(tmp_path / f"stopped_{rank}").read_text() for rank in (0, 1)] == ["8", "8"]
    assert load_latest(tmp_path)[0] == 8


def test_an_older_attempt_writes_no_checkpoint(tmp_path: Path) -> None:
    older = Asked()
    task = Sum(20)
    steps = task.steps

    def overtaken(start: int) -> Iterator[None]:
        for step, _ in enumerate(steps(start), start + 1):
            while step == 8 and not list_checkpoints(tmp_path):  # written in the background
                time.sleep(0.01)
            older.newest = step < 8
            yield

    task.steps = overtaken  # type: ignore[method-assign]
    with pytest.raises(StaleWriterError, match="attempt 1 is not the newest"):
        train(task, tmp_path, every=5, control=older)
    assert [p.name for p in list_checkpoints(tmp_path)] == ["step_00000005"]


def test_overtaken_between_check_and_rename(tmp_path: Path) -> None:
    """The newer attempt starts after the older one's last check:
    what that wrote is gone before its rename.
    """
    checks = 0

    def check() -> None:
        nonlocal checks
        checks += 1
        if checks == 2:  # right before the rename
            remove_leftovers(tmp_path, 2)

    with pytest.raises(CheckpointError, match="No such file"):
        save_checkpoint(
            tmp_path,
            3,
            Sum(1).state_dicts(),
            {},
            policy=SavePolicy(attempt=1, check_may_write=check),
        )
    assert list(tmp_path.iterdir()) == [] and checks == 2


def test_leftovers_of_older_attempts_only(tmp_path: Path) -> None:
    names = [
        ".step_00000001.attempt1.aa.tmp",
        ".step_00000002.attempt2.bb.tmp",
        ".step_00000003.cc.tmp",
    ]
    for name in names:
        (tmp_path / name).mkdir()
    remove_leftovers(tmp_path, 1)
    assert [p.name for p in tmp_path.iterdir()] == [names[1]]


def test_a_finished_training_removes_what_its_last_save_could_not(tmp_path: Path) -> None:
    train(Sum(6), tmp_path, every=2, policy=SavePolicy(keep=3))
    assert [p.name[-1] for p in list_checkpoints(tmp_path)] == ["2", "4", "6"]
    train(Sum(6), tmp_path, every=2, policy=SavePolicy(keep=2))
    assert [p.name[-1] for p in list_checkpoints(tmp_path)] == ["4", "6"]
