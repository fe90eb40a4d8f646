"""Writes of checkpoints that are cut short: at every call that changes the disk,
and by kill -9 at any moment.
"""

import os
import random
import signal
import tempfile
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import replace
from pathlib import Path

import processes
from checkpoint_cases import POLICY, loaded_step, meta_of, names, only, parts_of, save
from outcome import Outcome
from shim import Action, Crash, dead_after, exit_after, intercepted

from mugs.checkpoint.background import BackgroundWriter
from mugs.checkpoint.record import list_checkpoints, verify_checkpoint

OLD, NEW = 3, 4
NAME = "2_checkpoint_writes"


def prepared(folder: Path) -> Path:
    """A folder as after three saves: a save of NEW replaces the oldest of the two that are kept."""
    for step in (1, 2, OLD):
        save(folder, step)
    return folder


def calls_of_a_save(folder: Path) -> list[tuple[str, str]]:
    """The calls that one save makes, in order."""
    prepared(folder)
    with intercepted() as calls:
        save(folder, NEW)
    return calls.log


def raised(folder: Path, action: Action) -> None:
    """A save in this process that ends where the action says."""
    with suppress(Crash), intercepted(action):
        save(folder, NEW)


def exited(folder: Path, action: Action) -> None:
    """A save in a process of its own that is gone where the action says."""

    def work() -> None:
        with intercepted(action):
            save(folder, NEW)

    assert processes.run(work) in (0, 9)


WAYS: dict[str, tuple[Callable[[int], Action], Callable[[Path, Action], None]]] = {
    "raise": (dead_after, raised),
    "torn": (lambda count: dead_after(count, torn=True), raised),
    "exit": (exit_after, exited),
}


def boundaries(outcome: Outcome, root: Path, way: str) -> None:
    """End a save after each of its calls in turn: old or new state loads,
    and the next save cleans up.
    """
    total = len(calls_of_a_save(root / f"{way}_count"))
    make, attempt = WAYS[way]
    for count in range(total + 1):
        folder = prepared(root / f"{way}_{count}")
        attempt(folder, make(count))
        outcome.trials += 1
        where = f"{way} after call {count} of {total}"
        try:
            outcome.expect(loaded_step(folder) in (OLD, NEW), f"{where}: neither old nor new loads")
            save(folder, NEW + 1)
            outcome.expect(loaded_step(folder) == NEW + 1, f"{where}: the next save does not load")
            kept = (names(folder) == only(NEW, NEW + 1), names(folder) == only(OLD, NEW + 1))
            outcome.expect(any(kept), f"{where}: left {names(folder)}")
            for path in list_checkpoints(folder):
                verify_checkpoint(path)
        except (Exception, AssertionError) as error:
            outcome.complaints.append(f"{where}: {error}")


def write_for_ever(folder: Path, first: int, pipe: int) -> None:
    """Save in the background, back to back;
    tell the pipe `s` before each save and `d` once it is on disk.
    """
    writer = BackgroundWriter(folder, replace(POLICY, retry_seconds=5))
    for step in range(first, 1 << 20):
        os.write(pipe, f"s{step}\n".encode())
        writer.save(step, parts_of(step), meta_of(step))
        writer.wait()
        os.write(pipe, f"d{step}\n".encode())


def kills(outcome: Outcome, root: Path, trials: int, seed: int = 0) -> None:
    """Kill a process that saves back to back at random moments,
    again and again over the same folder.
    """
    rng, folder, newest = random.Random(seed), root / "kills", 0
    for trial in range(trials):
        reading, writing = os.pipe()
        process = processes.start(
            lambda first=newest + 1, pipe=writing: write_for_ever(folder, first, pipe)
        )
        os.close(writing)
        told = os.read(reading, 1 << 16)  # it is about to save
        time.sleep(rng.uniform(0, 0.06))
        os.kill(process, signal.SIGKILL)
        while more := os.read(reading, 1 << 16):
            told += more
        os.close(reading)
        outcome.trials += 1
        outcome.expect(processes.end(process) == -signal.SIGKILL, f"kill {trial}: ended by itself")
        lines = told.decode().split()
        started = max(int(line[1:]) for line in lines if line[0] == "s")
        durable = max((int(line[1:]) for line in lines if line[0] == "d"), default=newest)
        try:
            newest = loaded_step(folder)
            outcome.expect(
                durable <= newest <= started, f"kill {trial}: {newest} loads, {durable} was on disk"
            )
            outcome.expect(
                started - newest <= 1, f"kill {trial}: {newest} loads, {started} was begun"
            )
        except (Exception, AssertionError) as error:
            outcome.complaints.append(f"kill {trial}: {error}")
    save(folder, newest + 1)
    outcome.expect(
        names(folder) == only(newest, newest + 1) or newest == 0, f"left over: {names(folder)}"
    )


def run(trials: int = 1000, ways: tuple[str, ...] = tuple(WAYS)) -> Outcome:
    """Both, in a temporary folder."""
    outcome = Outcome(NAME)
    with tempfile.TemporaryDirectory() as root:
        for way in ways:
            boundaries(outcome, Path(root), way)
        at_boundaries = outcome.trials
        kills(outcome, Path(root), trials)
    outcome.note = (
        f"{trials} kill -9 at random moments, {at_boundaries} ends after the N-th call, all N"
    )
    return outcome
