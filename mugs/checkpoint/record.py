"""Layout and record of a checkpoint on disk, and whether it is good.

    <folder>/step_00001234/   one safetensors file per state dict, and state.json: step, meta,
                              size and SHA-256 of every file, SHA-256 of itself
    <folder>/.step_*.tmp      left by an interrupted write or removal
    <folder>/.room.*.tmp      left by an interrupted check of the free space
    <folder>/bad_step_*       quarantined: it did not verify

This module does not import torch, so a login node verifies checkpoints quickly. A record cannot
lead out of its folder: names are plain, and links are not followed.
"""

import json
import logging
import os
import re
import shutil
import uuid
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from pipeline.files import (
    ChecksumError,
    FormatVersionError,
    check_format_version,
    hash_file,
    sync_path,
    verify_checksum,
    with_checksum,
    write_new_file,
)

logger = logging.getLogger(__name__)
FORMAT = 2
RECORD_NAME = "state.json"
# A damaged or hostile record must not fill the memory.
RECORD_LIMIT = 64 << 20
_FOLDER = re.compile(r"step_(\d{8,})")
_LEFTOVER = re.compile(r"\.(step_\d{8,}|room)\..*tmp")
# Part of the temporary names that `save_load` writes under.
_ATTEMPT = re.compile(r"\.attempt(\d+)\.")
_FILE = re.compile(r"\w+\.safetensors", re.ASCII)
_HASH = re.compile(r"[0-9a-f]{64}")


class CheckpointError(RuntimeError):
    """A checkpoint cannot be used or written; the message names the file and the reason."""


class CheckpointReadError(CheckpointError):
    """The disk did not give the content of a checkpoint, which may be good."""


@dataclass(frozen=True)
class StoredFile:
    """Size and SHA-256 of a file."""

    size: int
    sha256: str


@dataclass(frozen=True)
class CheckpointRecord:
    """Content of `state.json`: the task's metadata `meta`, and the files that were written."""

    step: int
    meta: Mapping[str, Any]
    files: Mapping[str, StoredFile]


def checkpoint_name(step: int) -> str:
    """Return the folder name of a step."""
    return f"step_{step:08d}"


def checkpoint_step(path: Path) -> int:
    """Return the step of a checkpoint folder."""
    found = _FOLDER.fullmatch(path.name)
    assert found is not None, path
    return int(found[1])


def list_checkpoints(folder: Path) -> list[Path]:
    """Return checkpoint folders, oldest first, not verified, without leftovers."""
    if not folder.is_dir():
        return []
    # By number: names of more than eight digits do not sort as text.
    return sorted((p for p in folder.iterdir() if _FOLDER.fullmatch(p.name)), key=checkpoint_step)


def list_leftovers(folder: Path, attempt: int | None = None) -> list[Path]:
    """Return what interrupted writes and removals left behind.

    With `attempt`, leftovers of newer attempts are not included: they may be writing now.
    """
    found = (
        sorted(p for p in folder.iterdir() if _LEFTOVER.fullmatch(p.name))
        if folder.is_dir()
        else []
    )
    # A leftover without a tag comes from a removal or a space check; nobody continues either.
    tags = ((path, _ATTEMPT.search(path.name)) for path in found)
    return [path for path, tag in tags if attempt is None or tag is None or int(tag[1]) <= attempt]


def write_record(path: Path, record: CheckpointRecord) -> None:
    """Write `state.json` into a checkpoint folder.

    Raises:
        TypeError: the metadata is not JSON.
    """
    content = {"format": FORMAT, **asdict(record)}
    # Through JSON once, so that the checksum is of what a reader gets (tuples become lists).
    text = json.dumps(with_checksum(json.loads(json.dumps(content))), indent=1)
    write_new_file(path / RECORD_NAME, [text.encode()])


def read_record(path: Path) -> CheckpointRecord:
    """Read and check the `state.json` of a checkpoint folder.

    Raises:
        CheckpointError: it is not a good record; the message names it.
        CheckpointReadError: the disk failed; the record may be good.
        FormatVersionError: it is of a version that this code does not read.
    """
    file = path / RECORD_NAME
    try:
        check_plain_file(file, limit=RECORD_LIMIT)
        content = verify_checksum(json.loads(file.read_text(encoding="utf-8")))
        found = content.get("format", 1)
        check_format_version(str(file), found, newest=FORMAT, oldest=FORMAT)
        files = {name: StoredFile(**facts) for name, facts in content["files"].items()}
        record = CheckpointRecord(content["step"], content["meta"], files)
        name_it_has = checkpoint_name(record.step)
    except FormatVersionError:
        raise
    except ChecksumError as error:
        raise CheckpointError(f"{file}: {error}") from error
    except OSError as error:
        raise CheckpointReadError(f"{file}: cannot be read ({error.strerror})") from error
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise CheckpointError(f"{file}: not a readable checkpoint record ({error})") from error
    # A folder that was copied or renamed by hand must not resume at a wrong step.
    if name_it_has != path.name:
        raise CheckpointError(f"{file}: is the record of {name_it_has}")
    for name, facts in files.items():
        if not (
            _FILE.fullmatch(name)
            and isinstance(facts.size, int)
            and _HASH.fullmatch(str(facts.sha256))
        ):
            raise CheckpointError(
                f"{file}: lists {name!r} with {facts}: expected NAME.safetensors, size and SHA-256"
            )
    return record


def check_plain_file(file: Path, *, size: int | None = None, limit: int | None = None) -> None:
    """Raise CheckpointError unless `file` is a regular file of this size, or below the limit."""
    if file.is_symlink() or file.parent.is_symlink():
        raise CheckpointError(f"{file}: reached through a symbolic link, which is not followed")
    if not file.is_file():
        raise CheckpointError(f"{file}: missing")
    found = file.stat().st_size
    if size is not None and found != size:
        raise CheckpointError(f"{file}: {found} bytes, {size} were written")
    if limit is not None and found > limit:
        raise CheckpointError(f"{file}: {found} bytes, at most {limit} are read")


def verify_checkpoint(path: Path, only: str | None = None) -> CheckpointRecord:
    """Verify a checkpoint folder: its record, and size and SHA-256 of all files, or of one.

    Raises:
        CheckpointError: something differs; the message names the file.
    """
    record = read_record(path)
    if only is not None and only not in record.files:
        raise CheckpointError(f"{path}: has no {only} (it has: {', '.join(sorted(record.files))})")
    for name, facts in record.files.items():
        if only not in (None, name):
            continue
        # The size first: a file that was cut short is found without reading it.
        check_plain_file(path / name, size=facts.size)
        try:
            found = hash_file(path / name)
        except OSError as error:
            raise CheckpointReadError(
                f"{path / name}: cannot be read ({error.strerror})"
            ) from error
        if found != facts.sha256:
            raise CheckpointError(f"{path / name}: SHA-256 differs from the one recorded")
    return record


def total_checkpoint_bytes(folder: Path) -> int:
    """Return the bytes of all checkpoints in a folder."""
    files = (file for path in list_checkpoints(folder) for file in path.glob("*"))
    return sum(file.stat().st_size for file in files if file.is_file())


def quarantine_checkpoint(path: Path) -> Path:
    """Rename a bad checkpoint to `bad_...`, so that no run resumes from it."""
    target = path.with_name(f"bad_{path.name}")
    if target.exists():
        target = path.with_name(f"bad_{path.name}.{uuid.uuid4().hex[:8]}")
    # The rename must be on disk before a new checkpoint of the same step takes the old name.
    os.rename(path, target)
    sync_path(path.parent)
    logger.warning("%s does not verify: set aside as %s", path, target.name)
    return target


def remove_checkpoint(path: Path) -> None:
    """Remove a checkpoint such that no part of it ever looks like a checkpoint."""
    # Renamed first: an interruption of rmtree then leaves a leftover, not half a checkpoint.
    doomed = path.with_name(f".{path.name}.{uuid.uuid4().hex[:8]}.tmp")
    os.rename(path, doomed)
    shutil.rmtree(doomed, ignore_errors=True)


def remove_leftovers(folder: Path, attempt: int | None = None) -> None:
    """Remove what interrupted writes and removals left, except that of newer attempts."""
    delete_leftovers(list_leftovers(folder, attempt))


def delete_leftovers(paths: Iterable[Path]) -> None:
    """Remove leftovers; log those that cannot be removed."""
    for path in paths:
        try:
            shutil.rmtree(path) if path.is_dir() else path.unlink()
        except OSError as error:
            logger.warning(
                "%s: left over from an interrupted write, cannot be removed (%s)", path, error
            )
