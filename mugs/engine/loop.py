"""The loop around every training: resume, step, save now and then, save and stop when told to."""

import logging
import time
from collections.abc import Iterator, Mapping
from contextlib import closing
from functools import partial
from pathlib import Path
from typing import Any, Protocol

from mugs.engine import distributed
from mugs.engine.checkpoint import (
    CheckpointError,
    Parts,
    Writer,
    load_latest,
    remove_leftovers,
    save_checkpoint,
)
from mugs.engine.control import Control, StopVote, Unattended, fence

logger = logging.getLogger(__name__)


class Task(Protocol):
    """Something that is trained step by step, and what a resumed run needs of it."""

    total_steps: int

    def steps(self, start: int) -> Iterator[None]:
        """A generator that makes one optimizer step per item, from step `start` to the end."""

    def check(self) -> None:
        """Raise, on all ranks, where the state must not be saved."""

    def parts(self) -> Parts:
        """Tensors to save, by file and name."""

    def notes(self) -> dict[str, Any]:
        """JSON-able facts to save beside them."""

    def load(self, parts: Parts, notes: Mapping[str, Any]) -> None:
        """Take over saved state. Raises KeyError or RuntimeError where it does not fit."""


def train(task: Task, folder: Path, *, every: int, control: Control | None = None) -> None:
    """Train to the end, from the newest good checkpoint in `folder` when there is one; save after `every` steps.

    When `control` asks one rank to stop, all save after the same step and leave through `control.interrupted`.
    Raises CheckpointError, StaleWriterError, and what the task and `interrupted` raise.
    """
    control = control or Unattended()
    if distributed.is_main():
        remove_leftovers(folder, control.attempt)
    distributed.barrier()  # from here on no older attempt adds a checkpoint, so all ranks find the same
    start = resume(task, folder)
    control.beat(start)
    vote = StopVote(control)
    steps = task.steps(start)
    with closing(steps):  # type: ignore[type-var]
        for done, _ in enumerate(steps, start + 1):
            control.beat(done)
            last = done == task.total_steps
            stop = vote.stop() and not last
            if stop or last or done % every == 0:
                task.check()
                save(task, folder, done, control)
            if stop:
                vote.close()
                control.interrupted(done)
    vote.close()
    control.rest()


def save(task: Task, folder: Path, step: int, control: Control) -> None:
    """Checkpoint on rank 0, unless a newer attempt has started; the others wait."""
    if distributed.is_main():
        began = time.monotonic()
        writer = Writer(control.attempt, partial(fence, control))
        save_checkpoint(folder, step, task.parts(), task.notes(), writer=writer)
        control.saved(step, time.monotonic() - began)
    distributed.barrier()


def resume(task: Task, folder: Path) -> int:
    """Hand the newest good checkpoint to the task; returns the step to go on with."""
    found = load_latest(folder)
    if found is None:
        return 0
    step, parts, notes = found
    try:
        task.load(parts, notes)
    except (KeyError, RuntimeError) as error:
        raise CheckpointError(f"{folder}: checkpoint of step {step} does not fit this run: {error}") from error
    logger.info("resumed at step %d from %s", step, folder)
    return step
