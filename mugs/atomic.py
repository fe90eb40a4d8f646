"""Files and folders that are either complete or absent: written beside, synced, renamed."""

import hashlib
import os
import shutil
import uuid
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path


def fsync_path(path: Path) -> None:
    """Flush a file or folder to the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def make_folder(path: Path) -> None:
    """Create a folder and its parents, flushed to the disk; one that is there already is fine."""
    if path.is_dir():
        return
    make_folder(path.parent)
    path.mkdir(exist_ok=True)
    fsync_path(path.parent)


def write_synced(path: Path, chunks: Iterable[bytes | memoryview]) -> str:
    """Write a new file chunk by chunk, flush it to the disk and out of the page cache; returns its SHA-256 in hex.

    Raises FileExistsError, and OSError naming the file.
    """
    digest = hashlib.sha256()
    try:
        descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o666)
        try:
            for chunk in chunks:
                digest.update(chunk)
                rest = memoryview(chunk)
                while rest:
                    rest = rest[os.write(descriptor, rest) :]
            os.fsync(descriptor)
            if hasattr(os, "posix_fadvise"):
                os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
        finally:
            os.close(descriptor)
    except OSError as error:
        raise OSError(error.errno, error.strerror, str(path)) from error
    return digest.hexdigest()


@contextmanager
def replacing(
    path: Path, tag: str = "", check: Callable[[], None] = lambda: None
) -> Iterator[Path]:
    """Yield a temporary sibling to write; on success it is synced and renamed to `path`, else removed.

    `tag` becomes part of the temporary name; `check` may raise right before the rename.
    """
    make_folder(path.parent)
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
