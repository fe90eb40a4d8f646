"""Checkpoints of a training on all ranks: rank 0 writes, all ranks see its errors."""

import json
from pathlib import Path
from typing import Any, Protocol

from mugs import distributed
from mugs.checkpoint.background import BackgroundWriter, SaveReport
from mugs.checkpoint.save_load import SavePolicy, StateDicts, check_free_space_for_run
from pipeline.control import Control
from pipeline.files import open_to_append


class SavedTask(Protocol):
    """What is saved of a task."""

    total_steps: int

    def state_dicts(self) -> StateDicts:
        """Return the tensors to save, by file and name; all ranks call it."""

    def metadata(self) -> dict[str, Any]:
        """Return facts for JSON that are saved beside the tensors."""


class CheckpointSaver:
    """Saves a task's state into `folder`; `metrics.jsonl` beside the folder gets the times.

    All ranks make every call together, and an error of rank 0 is raised on all of them.
    """

    def __init__(self, task: SavedTask, folder: Path, policy: SavePolicy, control: Control) -> None:
        self.task = task
        self.policy = policy
        self.control = control
        self.metrics = folder.parent / "metrics.jsonl"
        self.writer = BackgroundWriter(folder, policy)
        # Before the first step, so that a disk too small for the run is noticed at once.
        parts = task.state_dicts()
        distributed.run_on_main(
            lambda: check_free_space_for_run(folder, parts, task.total_steps, policy)
        )

    def is_due(self, step: int, every: int) -> bool:
        """Return whether a checkpoint is taken after this step."""
        return step % every == 0 or step == self.task.total_steps or self.policy.is_milestone(step)

    def save(self, step: int) -> None:
        """Copy the state and start to write it, after the previous write is on disk."""
        # On all ranks, since these may be collectives; rank 0 alone writes.
        parts = self.task.state_dicts()
        notes = self.task.metadata()
        distributed.run_on_main(lambda: self._note(self.writer.save(step, parts, notes)))

    def finish(self) -> None:
        """Wait until the last checkpoint is on disk."""
        distributed.run_on_main(lambda: self._note(self.writer.wait()))

    def close(self) -> None:
        """Let no write outlive the training; errors are only logged."""
        self.writer.close()

    def _note(self, saved: SaveReport | None) -> None:
        if saved is not None:
            # Later jobs ask for their stop signal as early as a save of this length needs.
            self.control.saved(saved.step, saved.durable_s)
            try:
                with open_to_append(self.metrics) as stream:
                    stream.write(json.dumps(saved.fields()) + "\n")
            # The error of a write, unlike that of an open, does not name the file.
            except OSError as error:
                raise OSError(error.errno, error.strerror, str(self.metrics)) from error
