"""A fence around a folder: what this process would write outside of it is refused.

Random inputs may name any place, and a test may run as root.
"""

import contextlib
import errno
import os
import stat
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

_WRITES = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC
# Which arguments of an audit event are paths that it changes, each with that of its folder.
_CHANGED = {
    "os.chmod": ((0, 2),),
    "os.chown": ((0, 3),),
    "os.link": ((1, 3),),
    "os.mkdir": ((0, 2),),
    "os.remove": ((0, 1),),
    "os.rename": ((0, 2), (1, 3)),
    "os.rmdir": ((0, 1),),
    "os.symlink": ((1, 2),),
    "os.truncate": ((0, None),),
    "os.utime": ((0, 3),),
}


class _Fence:
    """What is fenced in now, None if nothing is, and what was refused."""

    folder: str | None = None
    refused: list[str] = []  # noqa: RUF012
    installed = False


@contextlib.contextmanager
def fenced(folder: Path) -> Iterator[list[str]]:
    """Refuse each change of a file outside a folder, as a read-only file system would.

    Yields the list of the paths that were refused, which grows. Python cannot remove an audit hook,
    so there is one for all fences. Other processes are not held back.
    """
    if not _Fence.installed:
        sys.addaudithook(_watch)
        _Fence.installed = True
    _Fence.folder, _Fence.refused = os.path.realpath(folder), []
    try:
        yield _Fence.refused
    finally:
        _Fence.folder = None


def _watch(event: str, arguments: tuple[Any, ...]) -> None:
    """Raise OSError in the call that would write; Python calls this before it does."""
    if _Fence.folder is None:
        return
    if event == "open":
        path, _, flags = arguments
        if isinstance(path, int) or not flags & _WRITES or _is_device(path):
            return
        _check(path, None)
    for path_at, folder_at in _CHANGED.get(event, ()):
        _check(arguments[path_at], None if folder_at is None else arguments[folder_at])


def _check(path: Any, folder: int | None) -> None:
    if isinstance(path, int):
        return  # an open file, which was looked at when it was opened
    base = "" if folder in (None, -1) else os.readlink(f"/proc/self/fd/{folder}")
    full = os.path.join(base, os.fsdecode(path))
    # A link itself is changed, not what it leads to.
    parent, name = os.path.split(full)
    place = os.path.join(os.path.realpath(parent), name)
    if os.path.commonpath((place, _Fence.folder or "/")) != _Fence.folder:
        _Fence.refused.append(place)
        raise OSError(errno.EROFS, os.strerror(errno.EROFS), full)


def _is_device(path: Any) -> bool:
    """Return whether a path is such as `/dev/null`, which holds nothing."""
    try:
        return stat.S_ISCHR(os.stat(path).st_mode)
    except (OSError, ValueError):
        return False
