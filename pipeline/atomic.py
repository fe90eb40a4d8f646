"""Files that are either whole or absent: written beside their place, flushed, then renamed."""

from __future__ import annotations

import json
import os
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any


def fsync_dir(path: Path) -> None:
    """Flush a folder's entries (new names, renames) to disk."""
    fd = os.open(path, os.O_RDONLY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


@contextmanager
def _written_beside(path: Path, text: str) -> Iterator[Path]:
    """A file next to `path` that holds `text`, on disk; it is to get its name within the block."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{uuid.uuid4().hex}")
    try:
        with temporary.open("w", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        yield temporary
    finally:
        temporary.unlink(missing_ok=True)
    fsync_dir(path.parent)


def write_text_atomic(path: Path, text: str) -> None:
    """Replace `path` by a file holding `text`; a reader sees the old file or the new one, never a part."""
    with _written_beside(path, text) as temporary:
        os.replace(temporary, path)


def write_json_atomic(path: Path, value: Any) -> None:
    """`write_text_atomic` of a value as indented JSON."""
    write_text_atomic(path, json.dumps(value, indent=1, default=str) + "\n")


def create_exclusive(path: Path, value: Any) -> None:
    """Create a JSON file with its whole content, at once; FileExistsError when somebody else has."""
    with _written_beside(path, json.dumps(value)) as temporary:
        os.link(temporary, path)


def read_json(path: Path) -> dict[str, Any] | None:
    """A JSON object, or None when the file is missing, unreadable, or holds anything else."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return value if isinstance(value, dict) else None
