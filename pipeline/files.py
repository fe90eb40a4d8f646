"""Files and folders that are either complete or absent, and the SHA-256 of files and records.

Everything that matters is written under a temporary name in the same folder, flushed to the disk,
and renamed. A reader therefore sees the old file or the new one, never a part, and a power cut
loses at most the new one. Only the standard library is used, so that every package may import this
module.
"""

import errno
import hashlib
import json
import math
import os
import re
import shutil
import stat
import tempfile
import time
import uuid
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from pathlib import Path
from typing import Any, TextIO

from pipeline.ownership import is_mine

CHECKSUM_KEY = "sha256"
# Records have some kB. A run root may be shared, so what others put there is read with a bound.
RECORD_LIMIT = 64 << 20
_NUMBERED = re.compile(r"[0-9]{1,9}\.json", re.ASCII)
# We may not look into a folder; or a file stands in its place, or a link that leads to itself.
CLOSED_FOLDER = (errno.EACCES, errno.EPERM, errno.ENOTDIR, errno.ELOOP)
NO_HARD_LINKS = (errno.EPERM, errno.ENOTSUP, errno.ENOSYS, errno.EMLINK)
# Larger than any time, size or count; JSON may hold integers that fit in no float.
_LARGEST_NUMBER = 1e18
_unreadable: ContextVar[list[Path] | None] = ContextVar("unreadable", default=None)


def expand_home(path: str | Path) -> Path:
    """Return a path with `~` and `~user` replaced; as it is where no such home folder is known.

    `Path.expanduser` would raise RuntimeError then.
    """
    return Path(os.path.expanduser(path))


def sync_path(path: Path) -> None:
    """Flush a file, or the entries of a folder (new names, renames), to the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        # Some file systems, such as CIFS, cannot flush a folder; databases ignore that too.
        if error.errno != errno.EINVAL or not path.is_dir():
            raise OSError(error.errno, error.strerror, str(path)) from error
    finally:
        os.close(descriptor)


def follow_umask(path: Path) -> None:
    """Give a file the permissions that a new file gets here, so that colleagues can read it."""
    probe = path.with_name(f".{path.name}.{uuid.uuid4().hex[:8]}.tmp")
    probe.touch(0o666)
    try:
        path.chmod(probe.stat().st_mode)
    finally:
        probe.unlink()


def cache_folder() -> Path | None:
    """Return the user's folder for what may be found out again: `MUGS_CACHE_DIR`, or in the home.

    Not in the run root, as `plan` and `doctor` come first and change nothing there. Login and
    compute nodes share the home folder as a rule. Returns None for a user without home folder.
    """
    caches = os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")
    folder = Path(os.environ.get("MUGS_CACHE_DIR") or Path(caches, "mugs-repro"))
    return folder if folder.is_absolute() else None


def make_folder(path: Path) -> None:
    """Create a folder and its parents, flushed to the disk. An existing folder is fine."""
    if path.is_dir():
        return
    make_folder(path.parent)
    path.mkdir(exist_ok=True)
    sync_path(path.parent)


def read_server_time(folder: Path) -> float:
    """Return the time of the file server, by which the files in a folder are dated.

    It may differ from the clock of this machine. The latter is returned if no file can be made.
    """
    try:
        with tempfile.TemporaryFile(dir=folder) as file:
            return os.fstat(file.fileno()).st_mtime
    except OSError:
        return time.time()


def measure_age(path: Path, folder: Path) -> float:
    """Return how many seconds ago a file was written; infinity if there is none.

    By the clock of the file server, in whose `folder` a file can be made: clocks of hosts may be a
    day off. One from the future counts as old: the server's clock was wrong when it was written.
    """
    try:
        written = path.stat().st_mtime
    except (FileNotFoundError, NotADirectoryError):
        return math.inf
    return abs(read_server_time(folder) - written)


def write_new_file(path: Path, chunks: Iterable[bytes | memoryview]) -> str:
    """Write a new file chunk by chunk, flush it to the disk, and return its SHA-256 in hex.

    Its pages leave the page cache: a checkpoint of many GB must not push out the images that are
    read next.

    Raises:
        FileExistsError: there is a file of this name.
        OSError: the disk failed; the error names the file.
    """
    digest = hashlib.sha256()
    try:
        descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o666)
        try:
            for chunk in chunks:
                digest.update(chunk)
                rest = memoryview(chunk)
                # One call writes at most 2 GB on Linux, and less if the disk gets full.
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


def _check_replaceable(path: Path) -> None:
    """Raise OSError if a path is a device or a pipe: a rename would put a file in its place."""
    try:
        mode = path.lstat().st_mode
    except FileNotFoundError:
        return
    if not (stat.S_ISREG(mode) or stat.S_ISDIR(mode) or stat.S_ISLNK(mode)):
        raise OSError(errno.EINVAL, "not a regular file, it is not replaced", str(path))


@contextmanager
def replace_atomically(
    path: Path, tag: str = "", check: Callable[[], None] = lambda: None
) -> Iterator[Path]:
    """Yield a temporary path beside `path`; what is written there takes the place of `path`.

    The block writes a file or a folder. When it ends well, all of it is flushed to the disk and
    renamed; when it raises, it is removed.

    `tag` becomes part of the temporary name, so that leftovers tell who wrote them. `check` is
    called right before the rename, and may raise to prevent it.
    """
    make_folder(path.parent)
    _check_replaceable(path)
    mark = f"{tag}." if tag else ""
    temporary = path.with_name(f".{path.name}.{mark}{uuid.uuid4().hex[:8]}.tmp")
    try:
        yield temporary
        # Content first, then the name: after a power cut a renamed file must not be empty.
        if temporary.is_dir():
            for inner in temporary.rglob("*"):
                sync_path(inner)
        sync_path(temporary)
        check()
        os.replace(temporary, path)
        sync_path(path.parent)
    finally:
        if temporary.is_dir():
            shutil.rmtree(temporary, ignore_errors=True)
        else:
            temporary.unlink(missing_ok=True)


def write_atomic(path: Path, content: str | bytes, *, private: bool = False) -> Path:
    """Replace a file as a whole, text as UTF-8; a `private` one only its owner can read.

    Returns its path.
    """
    with replace_atomically(path) as temporary:
        if private:
            temporary.touch(mode=0o600)
        temporary.write_bytes(content.encode() if isinstance(content, str) else content)
    return path


def check_overwrite(path: Path, mark: str, *, force: bool) -> None:
    """Check that a file may be replaced: it is missing, or we wrote it, as a mark in it tells.

    With `force`, any regular file may be.

    Raises:
        OverwriteError: it is a file of somebody else, or no regular file.
    """
    try:
        with open(open_regular_file(path), "rb") as stream:
            head = stream.read(4096)
    except FileNotFoundError:
        return
    except OSError as error:
        raise OverwriteError(f"{path}: {error.strerror}, it is not overwritten") from error
    if mark.encode() not in head and not force:
        raise OverwriteError(
            f"{path}: was not written by this command, it is not overwritten; --force does"
        )


class OverwriteError(ValueError):
    """A file would be lost."""


def write_json_atomic(path: Path, value: Any) -> None:
    """Replace a file by a value as indented JSON."""
    write_atomic(path, json.dumps(value, indent=1, default=str) + "\n")


def create_json(path: Path, value: Any) -> None:
    """Create a JSON file that appears with its whole content at once.

    Only one of several processes succeeds. A file system without hard links gets the file first and
    the content a moment later, which a reader takes for no record yet.

    Raises:
        FileExistsError: somebody else was first.
    """
    make_folder(path.parent)
    content = json.dumps(value).encode()
    temporary = path.with_name(f".{path.name}.{uuid.uuid4().hex[:8]}.tmp")
    try:
        # Unlike a rename, a link fails if the name exists.
        write_new_file(temporary, [content])
        os.link(temporary, path)
    except OSError as error:
        if error.errno not in NO_HARD_LINKS:
            raise
        write_new_file(path, [content])
    finally:
        temporary.unlink(missing_ok=True)
    sync_path(path.parent)


def open_regular_file(path: Path) -> int:
    """Return a descriptor to read a regular file.

    Raises:
        OSError: there is none: a pipe or a device would be waited for without end.
    """
    # Without O_NONBLOCK, opening a pipe waits for somebody who writes to it.
    descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK)
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):
        os.close(descriptor)
        raise OSError(errno.EINVAL, "not a regular file", str(path))
    return descriptor


def read_bounded(path: Path, limit: int = RECORD_LIMIT, *, owner: int | None = None) -> bytes:
    """Return the content of a regular file.

    Raises:
        OSError: there is none, it has more bytes than `limit`: it is no record of ours, or would
            fill the memory; or it belongs to another user than `owner`.
    """
    with open(open_regular_file(path), "rb") as stream:
        found = os.fstat(stream.fileno())
        if owner is not None and found.st_uid != owner:
            raise OSError(errno.EPERM, "belongs to another user than its folder", str(path))
        # A file of /proc says that it has no bytes, and one may grow while it is read.
        size = min(limit, found.st_size)
        content = b"" if found.st_size > limit else stream.read(size + 1)
        if len(content) > size:
            content += stream.read(limit + 1 - len(content))
    if max(found.st_size, len(content)) > limit:
        raise OSError(errno.EFBIG, f"more than {limit} bytes, so it is not read", str(path))
    return content


def list_numbered(folder: str | Path) -> list[int]:
    """Return the numbers of the files `NNNN.json` of a folder, ascending.

    Only those of the folder's owner: where others may write, they could plant any number. A folder
    that cannot be read raises, but within `collect_unreadable` it is named there.
    """
    try:
        owner = os.stat(folder).st_uid
        names = [
            name.removesuffix(".json")
            for name in os.listdir(folder)
            # `0001.failed` and its like are not digits only.
            if _NUMBERED.fullmatch(name) and _find_owner(f"{folder}/{name}") == owner
        ]
    except FileNotFoundError:
        return []
    except OSError as error:
        # Elsewhere an empty list would say that no attempt or lock is newer than ours.
        if error.errno not in CLOSED_FOLDER or _unreadable.get() is None:
            raise
        note_unreadable(Path(folder))
        return []
    return sorted(map(int, names))


def _find_owner(path: str) -> int | None:
    # As text: this is asked of each attempt of thousands of runs.
    try:
        return os.lstat(path).st_uid
    except FileNotFoundError:
        return None  # another process has renamed it meanwhile, as one of another user


def read_json(path: Path, fields: Mapping[str, type] | None = None) -> dict[str, Any] | None:
    """Read a JSON object of a run folder; None if the file is missing or unreadable.

    It is unreadable if it is no regular file, is damaged, belongs to another user than its folder,
    or if one of `fields` has a value of another type (None is fine; `float` is any finite number).
    Then `collect_unreadable` names it.
    """
    try:
        value = json.loads(read_bounded(path, owner=path.parent.stat().st_uid))
    except FileNotFoundError:
        if path.is_symlink():
            note_unreadable(path)
        return None
    except (OSError, ValueError, RecursionError):
        note_unreadable(path)
        return None
    if isinstance(value, dict) and all(
        value.get(key) is None or _is_of_type(value[key], kind)
        for key, kind in (fields or {}).items()
    ):
        return value
    note_unreadable(path)
    return None


def _is_of_type(value: object, kind: type) -> bool:
    if kind in (int, float):
        numbers = int if kind is int else (int, float)
        # Also false for NaN. In Python, True is an int.
        return (
            isinstance(value, numbers)
            and not isinstance(value, bool)
            and abs(value) < _LARGEST_NUMBER
        )
    return isinstance(value, kind)


def note_unreadable(path: Path) -> None:
    """Name a file that is there but cannot be read to the surrounding `collect_unreadable`."""
    found = _unreadable.get()
    if found is not None and path not in found:
        found.append(path)


@contextmanager
def collect_unreadable() -> Iterator[list[Path]]:
    """Yield a list that gets the records which cannot be read within the block.

    To the reader they are as good as missing; to the user they are named.
    """
    found: list[Path] = []
    token = _unreadable.set(found)
    try:
        yield found
    finally:
        _unreadable.reset(token)


def open_to_append(path: Path) -> TextIO:
    """Open a text file of ours to append to; it is made if it is missing.

    Raises:
        OSError: it is a link, no regular file, has a second name, or belongs to another user. What
            we write would then end up where somebody else wants it.
    """
    flags = os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_NOFOLLOW | os.O_NONBLOCK
    try:
        descriptor = os.open(path, flags, 0o666)
    except OSError as error:
        if error.errno in (errno.ELOOP, errno.ENXIO):
            raise OSError(error.errno, "is a link or a pipe, nothing is written", path) from None
        raise
    found = os.fstat(descriptor)
    if not stat.S_ISREG(found.st_mode) or found.st_nlink > 1 or not is_mine(found, path.parent):
        os.close(descriptor)
        reason = "is no file of ours with one name, nothing is written"
        raise OSError(errno.EPERM, reason, str(path))
    return os.fdopen(descriptor, "a", encoding="utf-8")


class ChecksumError(ValueError):
    """A record differs from what was written."""


def hash_json(content: Mapping[str, Any]) -> str:
    """Return the SHA-256 of JSON-able content."""
    # Sorted and without white space, so that a record that was read and written again keeps its
    # checksum.
    text = json.dumps(content, sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()


def with_checksum(content: Mapping[str, Any]) -> dict[str, Any]:
    """Return the content and, under the key `sha256`, its checksum."""
    return {**content, CHECKSUM_KEY: hash_json(content)}


def verify_checksum(content: Any) -> dict[str, Any]:
    """Return the content without its checksum.

    Raises:
        ChecksumError: the checksum is missing, or belongs to other content.
    """
    if not isinstance(content, dict) or CHECKSUM_KEY not in content:
        raise ChecksumError("it has no checksum")
    rest = {key: value for key, value in content.items() if key != CHECKSUM_KEY}
    try:
        found = hash_json(rest)
    except TypeError as error:
        raise ChecksumError(f"it contains a value that is not JSON: {error}") from error
    if found != content[CHECKSUM_KEY]:
        raise ChecksumError("its SHA-256 differs from the one recorded in it")
    return rest


class FormatVersionError(ValueError):
    """A record was written by newer code, or by code too old; the message says what to do.

    Unlike a damaged record, it is not passed over: the work behind it would be done again, and the
    record replaced.
    """


def check_format_version(where: str, found: Any, *, newest: int, oldest: int = 1) -> None:
    """Raise FormatVersionError unless this code reads a record of the version `found`."""
    if type(found) is int and oldest <= found <= newest:
        return
    reads = f"version {newest}" if oldest == newest else f"versions {oldest} to {newest}"
    newer = type(found) is int and found > newest
    remedy = (
        "it was written by newer code: use that code, or another run root"
        if newer
        else "use the code that wrote it, or another run root"
    )
    raise FormatVersionError(
        f"{where}: format version {found!r}, this code reads {reads}; {remedy}"
    )


def hash_named_files(root: Path, files: Iterable[Path]) -> str:
    """Return the SHA-256 over names and contents of files, given by their paths below `root`."""
    digest = hashlib.sha256()
    for file in files:
        # A name may hold bytes that are no text.
        digest.update(os.fsencode(f"{file.as_posix()} {hash_file(root / file)}\n"))
    return digest.hexdigest()


def hash_file(path: Path) -> str:
    """Return the SHA-256 of a regular file, in hex."""
    with open(open_regular_file(path), "rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()
