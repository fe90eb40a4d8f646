"""Save, keep and load the state that a run resumes from; `record` describes it on disk.

A folder is filled under a temporary name, synced and renamed, so it is complete or absent. Then it
is read back, and only if it verifies are older ones removed. A run resumes from the newest
checkpoint that verifies; bad ones are logged and skipped.
"""

import errno
import logging
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from threading import Event
from typing import Any

from torch import Tensor

from mugs.checkpoint import record
from mugs.checkpoint.record import (
    CheckpointError,
    CheckpointRecord,
    checkpoint_name,
    list_checkpoints,
    verify_checkpoint,
)
from mugs.checkpoint.space import check_free_space, format_bytes, retry_disk_errors
from mugs.checkpoint.tensors import read_tensors, write_tensors
from pipeline.files import make_folder, replace_atomically

logger = logging.getLogger(__name__)
StateDicts = dict[str, dict[str, Tensor]]


def allow_every_write() -> None:
    """The check of a run that has no other attempts: every write is allowed."""


@dataclass(frozen=True, kw_only=True)
class SavePolicy:
    """What is kept, how long a full or failing disk is retried, and who may write.

    keep: that many newest checkpoints stay. Those of every `milestone_steps` stay too (0: none).
    retry_seconds: how long a write is retried after ENOSPC, EDQUOT, EIO or ESTALE.
    attempt: number of this start of the run, part of temporary names. The higher one is newer.
    check_may_write: called before anything is published or removed; raises if this process may not
    write.

    The check comes right before the rename, and a newer attempt removes what older ones began
    before it reads. So the rename of an older attempt either comes before that and is seen, or
    finds nothing to rename. What remains is a shared file system that shows an old listing for
    longer than a save takes.
    """

    keep: int = 2
    milestone_steps: int = 0
    retry_seconds: float = 600.0
    attempt: int = 1
    check_may_write: Callable[[], None] = allow_every_write

    def __post_init__(self) -> None:
        if self.keep < 1:
            raise ValueError(f"keep {self.keep}: expected at least 1 checkpoint")

    def is_milestone(self, step: int) -> bool:
        """Return whether the checkpoint of a step stays for good."""
        return self.milestone_steps > 0 and step % self.milestone_steps == 0


def state_bytes(parts: StateDicts) -> int:
    """Return the bytes of all tensors."""
    return sum(tensor.nbytes for tensors in parts.values() for tensor in tensors.values())


def check_free_space_for_run(
    folder: Path, parts: StateDicts, total_steps: int, policy: SavePolicy
) -> None:
    """Raise CheckpointError unless all kept checkpoints, and one being written, fit on the disk."""
    milestones = total_steps // policy.milestone_steps if policy.milestone_steps else 0
    size = state_bytes(parts)
    # One more than are kept, because the new one is written before an old one goes.
    count = policy.keep + milestones + 1
    purpose = f"{count} checkpoints of {format_bytes(size)}, less what they take already"
    try:
        make_folder(folder)
        check_free_space(folder, count * size - record.total_checkpoint_bytes(folder), purpose)
    except OSError as error:
        raise CheckpointError(
            f"{folder}: {error.strerror}; make room, or keep fewer checkpoints"
        ) from error


def save_checkpoint(
    folder: Path,
    step: int,
    parts: StateDicts,
    meta: Mapping[str, Any],
    *,
    policy: SavePolicy | None = None,
    stop: Event | None = None,
    published: Callable[[], None] = allow_every_write,
) -> Path:
    """Write `step_XXXXXXXX` and remove what the policy does not keep.

    A good checkpoint of that step stays as it is. `published` is called once the checkpoint is
    there for good. Setting `stop` ends the retries.

    Raises:
        CheckpointError: it cannot be written; older ones are intact.
    """
    policy = policy or SavePolicy()
    target = folder / checkpoint_name(step)

    def attempt() -> None:
        # Every try starts over: the previous one may have left files, or a newer attempt has
        # started.
        policy.check_may_write()
        _tidy(folder, step, policy)
        if not target.exists():
            _write(target, step, parts, meta, policy)
        # On disk from here on: a kill during the read-back leaves a complete checkpoint.
        published()
        _read_back(target)

    retry_disk_errors(
        attempt, f"writing checkpoint {target}", seconds=policy.retry_seconds, stop=stop or Event()
    )
    # Only now, when the new one has been read back, may older ones go.
    policy.check_may_write()
    remove_old_checkpoints(folder, target, policy)
    return target


def _tidy(folder: Path, step: int, policy: SavePolicy) -> None:
    """Remove leftovers; quarantine bad checkpoints of this step or a later one."""
    record.remove_leftovers(folder, policy.attempt)
    for path in list_checkpoints(folder):
        # Only these matter: a bad older one never hides the one that is written now.
        if record.checkpoint_step(path) >= step:
            try:
                verify_checkpoint(path)
            except CheckpointError as error:
                logger.warning("%s", error)
                record.quarantine_checkpoint(path)


def _write(
    target: Path, step: int, parts: StateDicts, meta: Mapping[str, Any], policy: SavePolicy
) -> None:
    make_folder(target.parent)
    check_free_space(target.parent, state_bytes(parts), f"the checkpoint of step {step}")
    with replace_atomically(
        target, f"attempt{policy.attempt}", policy.check_may_write
    ) as temporary:
        # The record comes last, so a folder with a record has all its files.
        temporary.mkdir()
        files = {f"{name}.safetensors": tensors for name, tensors in parts.items()}
        stored = {name: write_tensors(temporary / name, tensors) for name, tensors in files.items()}
        record.write_record(temporary, CheckpointRecord(step, meta, stored))


def _read_back(target: Path) -> None:
    """Read back what was written. If it is bad, quarantine it and raise EIO, which is retried."""
    try:
        verify_checkpoint(target)
    except CheckpointError as error:
        record.quarantine_checkpoint(target)
        raise OSError(
            errno.EIO, f"read back wrong right after it was written ({error})", str(target)
        ) from error


def remove_old_checkpoints(folder: Path, newest: Path, policy: SavePolicy) -> None:
    """Remove old checkpoints. `newest` has been read back and always stays."""
    # `keep` is at least 1: [: -0] would be empty, and nothing would ever be removed.
    for old in list_checkpoints(folder)[: -policy.keep]:
        if old != newest and not policy.is_milestone(record.checkpoint_step(old)):
            # A checkpoint that stays too long costs space only, so the run continues.
            try:
                record.remove_checkpoint(old)
            except OSError as error:
                logger.warning("%s: no longer needed, cannot be removed (%s)", old, error)


def load_latest(folder: Path) -> tuple[int, StateDicts, dict[str, Any]] | None:
    """Return step, state dicts and metadata of the newest good checkpoint; None if there is none.

    Raises:
        CheckpointError: there are checkpoints, but no good one. Starting over in silence would
            throw the work away.
        FormatVersionError: the newest one is of a version that this code does not read.
    """
    reasons = []
    # Newest first. A bad one costs the steps since the one before it, not the run.
    for path in reversed(list_checkpoints(folder)):
        try:
            return load_checkpoint(path)
        except CheckpointError as error:
            logger.warning("%s; falling back to the checkpoint before it", error)
            reasons.append(str(error))
    if reasons:
        raise CheckpointError(
            f"none of the {len(reasons)} checkpoints is good, remove them to start over: "
            + "; ".join(reasons)
        )
    return None


def load_checkpoint(path: Path) -> tuple[int, StateDicts, dict[str, Any]]:
    """Verify and read a checkpoint; raise CheckpointError with the name of a bad file."""
    found = verify_checkpoint(path)
    parts = {os.path.splitext(name)[0]: read_tensors(path / name) for name in found.files}
    return found.step, parts, dict(found.meta)


def load_state_dict_file(path: Path, name: str) -> dict[str, Tensor]:
    """Verify and read one state dict; raise CheckpointError with the name of a bad file."""
    file = f"{name}.safetensors"
    verify_checkpoint(path, only=file)
    return read_tensors(path / file)
