"""The loop around every training: resume, step, save now and then, save and stop when told to."""

import logging
from collections.abc import Iterator, Mapping
from contextlib import closing
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, Protocol

from mugs import distributed
from mugs.checkpoint.record import CheckpointError, checkpoint_name, remove_leftovers
from mugs.checkpoint.save_load import (
    SavePolicy,
    StateDicts,
    load_checkpoint,
    load_latest,
    remove_old_checkpoints,
)
from mugs.checkpoint.saver import CheckpointSaver
from mugs.engine.control import NullControl, StopConsensus, check_may_write
from pipeline.control import Control

logger = logging.getLogger(__name__)


class Task(Protocol):
    """Something that is trained step by step, and what a resumed run needs of it."""

    total_steps: int

    def steps(self, start: int) -> Iterator[None]:
        """A generator that makes one optimizer step per item, from step `start` to the end."""

    def check_before_save(self) -> None:
        """Raise, on all ranks, where the state must not be saved."""

    def state_dicts(self) -> StateDicts:
        """Tensors to save, by file and name; called on all ranks."""

    def metadata(self) -> dict[str, Any]:
        """JSON-able facts to save beside them."""

    def load_state(self, parts: StateDicts, notes: Mapping[str, Any]) -> None:
        """Take over saved state. Raises KeyError or RuntimeError where it does not fit."""


def train(
    task: Task,
    folder: Path,
    *,
    every: int,
    policy: SavePolicy | None = None,
    control: Control | None = None,
) -> None:
    """Train to the end, from the newest good checkpoint in `folder` when there is one; save after `every` steps.

    When `control` asks one rank to stop, all save after the same step and leave through `control.interrupted`.
    Returns when the last checkpoint is on disk. Raises CheckpointError, StaleWriterError, and what the task and
    `interrupted` raise.
    """
    control = control or NullControl()
    policy = replace(
        policy or SavePolicy(),
        attempt=control.attempt,
        check_may_write=partial(check_may_write, control),
    )
    start = resume_training(task, folder, policy)
    control.heartbeat(start)
    vote = StopConsensus(control)
    steps = task.steps(start)
    saver = CheckpointSaver(task, folder, policy, control)
    with closing(saver), closing(steps):  # type: ignore[type-var]
        for done, _ in enumerate(steps, start + 1):
            control.heartbeat(done)
            stop = vote.agree_to_stop() and done < task.total_steps
            if stop or saver.is_due(done, every):
                task.check_before_save()
                saver.save(done)
            if stop:
                saver.finish()
                vote.close()
                control.interrupted(done)
        saver.finish()
    vote.close()
    control.finish()


def resume_training(task: Task, folder: Path, policy: SavePolicy) -> int:
    """Hand the newest good checkpoint, by rank 0's judgement, to the task; returns the step to go on with."""
    found = None

    def choose() -> int:
        nonlocal found
        policy.check_may_write()
        remove_leftovers(folder, policy.attempt)
        found = load_latest(folder)
        if found is not None and found[0] == task.total_steps:
            remove_old_checkpoints(
                folder, folder / checkpoint_name(found[0]), policy
            )  # no save will follow that does it
        return -1 if found is None else found[0]

    step = int(distributed.run_on_main(choose))
    if step < 0:
        return 0
    _, parts, notes = found or load_checkpoint(folder / checkpoint_name(step))
    try:
        task.load_state(parts, notes)
    except (KeyError, RuntimeError) as error:
        raise CheckpointError(
            f"{folder}: checkpoint of step {step} does not fit this run: {error}"
        ) from error
    logger.info("resumed at step %d from %s", step, folder)
    return step
