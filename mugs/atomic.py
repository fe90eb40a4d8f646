"""Files and folders that are either complete or absent: written beside, synced, renamed."""

import os
import shutil
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path


def fsync_path(path: Path) -> None:
    """Flush a file or folder to the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@contextmanager
def replacing(path: Path, tag: str = "", check: Callable[[], None] = lambda: None) -> Iterator[Path]:
    """Yield a temporary sibling to write; on success it is synced and renamed to `path`, else removed.

    `tag` becomes part of the temporary name; `check` may raise right before the rename.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    mark = f"{tag}." if tag else ""
    temporary = path.with_name(f".{path.name}.{mark}{uuid.uuid4().hex[:8]}.tmp")
    try:
        yield temporary
        if temporary.is_dir():
            for inner in temporary.iterdir():
                fsync_path(inner)
        fsync_path(temporary)
        check()
        os.replace(temporary, path)
        fsync_path(path.parent)
    finally:
        if temporary.is_dir():
            shutil.rmtree(temporary, ignore_errors=True)
        else:
            temporary.unlink(missing_ok=True)


def write_text_atomic(path: Path, text: str) -> None:
    """Replace a text file as a whole."""
    with replacing(path) as temporary:
        temporary.write_text(text, encoding="utf-8")
