"""The loop around every training: resume, step, save now and then, save and stop when told to."""

import logging
from collections.abc import Iterator, Mapping
from contextlib import closing
from pathlib import Path
from typing import Any, Protocol

from mugs.engine import distributed
from mugs.engine.checkpoint import CheckpointError, Parts, load_latest, save_checkpoint

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


def train(task: Task, folder: Path, *, every: int) -> None:
    """Train to the end, from the newest good checkpoint in `folder` when there is one; save after `every` steps.

    Raises CheckpointError, and what the task raises.
    """
    start = resume(task, folder)
    steps = task.steps(start)
    with closing(steps):  # type: ignore[type-var]
        for done, _ in enumerate(steps, start + 1):
            if done % every == 0 or done == task.total_steps:
                task.check()
                save(task, folder, done)


def save(task: Task, folder: Path, step: int) -> None:
    """Checkpoint on rank 0; the others wait."""
    if distributed.is_main():
        save_checkpoint(folder, step, task.parts(), task.notes())
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
