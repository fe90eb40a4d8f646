"""The loop around every training: resume, step, save checkpoints, stop when asked to."""

import json
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
    load_latest,
    remove_old_checkpoints,
)
from mugs.checkpoint.saver import CheckpointSaver, SavedTask
from mugs.engine.control import NullControl, StopConsensus, check_may_write
from pipeline.control import Control

logger = logging.getLogger(__name__)


class Task(SavedTask, Protocol):
    """A training step by step, and the state that a resumed run needs."""

    def steps(self, start: int) -> Iterator[None]:
        """Make one optimizer step per item, from step `start` to the end."""

    def check_before_save(self) -> None:
        """Raise, on all ranks, if the state must not be saved."""

    def load_state(self, state_dicts: StateDicts, metadata: Mapping[str, Any]) -> None:
        """Load saved state.

        Raises:
            KeyError, RuntimeError: it does not fit.
        """


def train(
    task: Task,
    folder: Path,
    *,
    every: int,
    policy: SavePolicy | None = None,
    control: Control | None = None,
) -> None:
    """Train to the end, from the newest good checkpoint in `folder`; save after `every` steps.

    When one rank is asked to stop, all ranks save after the same step and leave through
    `control.interrupted`. Returns when the last checkpoint is on disk.

    Raises:
        CheckpointError: there are only bad checkpoints, one does not fit, or none can be written.
        StaleWriterError: a newer attempt has started.
        Exception: whatever the task or `control.interrupted` raises.
    """
    control = control or NullControl()
    policy = replace(
        policy or SavePolicy(),
        attempt=control.attempt,
        check_may_write=partial(check_may_write, control),
    )
    start = resume_training(task, folder, policy)
    control.heartbeat(start)
    consensus = StopConsensus(control)
    steps = task.steps(start)
    # closing(saver) lets no write outlive this process, whatever the step raises.
    saver = CheckpointSaver(task, folder, policy, control)
    with closing(saver), closing(steps):  # type: ignore[type-var]
        for done, _ in enumerate(steps, start + 1):
            # The watchdog of the job counts the time between heartbeats.
            control.heartbeat(done)
            # The call comes first: it is a collective, which every rank enters after every step.
            # After the last step nothing is left to resume, so the run ends as usual.
            stop = consensus.agree_to_stop() and done < task.total_steps
            if stop or saver.is_due(done, every):
                # Never save a state that a resumed run could not use.
                task.check_before_save()
                saver.save(done)
            if stop:
                # The requeued job must find the checkpoint on disk.
                saver.finish()
                consensus.close()
                control.interrupted(done)
        saver.finish()
    consensus.close()
    control.finish()


def share_state(
    found: tuple[int, StateDicts, dict[str, Any]] | None,
) -> tuple[StateDicts, dict[str, Any]]:
    """Return the state that rank 0 has read on all ranks.

    Over the network: forty ranks that each read the checkpoint of a ViT-L would ask the file system
    for 250 GB at once.
    """
    flat = None
    notes = ""
    if found is not None:
        _, state_dicts, metadata = found
        # The part of a tensor is what comes before the first "/", which no name of a part has.
        flat = {
            f"{part}/{name}": value
            for part, tensors in state_dicts.items()
            for name, value in tensors.items()
        }
        notes = json.dumps([list(state_dicts), metadata])
    parts, metadata = json.loads(distributed.broadcast_from_main(notes))
    shared: StateDicts = {part: {} for part in parts}
    for key, value in distributed.share_tensors_of_main(flat).items():
        part, _, name = key.partition("/")
        shared[part][name] = value
    return shared, metadata


def resume_training(task: Task, folder: Path, policy: SavePolicy) -> int:
    """Load the newest good checkpoint into the task, and return the step to continue from.

    Rank 0 decides which one is good, so that no two ranks resume from different steps.
    """
    found = None

    # First the check, then the cleaning, then the reading: SavePolicy explains the order.
    def choose() -> int:
        nonlocal found
        policy.check_may_write()
        remove_leftovers(folder, policy.attempt)
        found = load_latest(folder)
        if found is not None and found[0] == task.total_steps:
            # The run is done, so no later save removes them.
            remove_old_checkpoints(folder, folder / checkpoint_name(found[0]), policy)
        # The answer travels to all ranks as text; -1 stands for no checkpoint.
        return -1 if found is None else found[0]

    step = int(distributed.run_on_main(choose))
    if step < 0:
        return 0
    state_dicts, metadata = share_state(found)
    try:
        task.load_state(state_dicts, metadata)
    except (KeyError, RuntimeError) as error:
        raise CheckpointError(
            f"{folder}: checkpoint of step {step} does not fit this run: {error}"
        ) from error
    logger.info("resumed at step %d from %s", step, folder)
    return step
