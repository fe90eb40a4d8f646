"""Whose a file is, and folders that are reached without following a link.

A run root may be shared. What another user put there may be read as data, but it is not ours: we
neither continue, run nor remove it (docs/security.md).
"""

import os
import pwd
import re
import stat
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from functools import cache
from itertools import count
from pathlib import Path

OTHERS_WRITE = 0o022
_SET_ASIDE = re.compile(r"\.of-\d+-\d+$")
_FOLDER = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW


class ForeignOwnerError(PermissionError):
    """A file or folder belongs to another user, so it is not used."""


def is_mine(found: os.stat_result, folder: Path) -> bool:
    """Return whether something in `folder` belongs to the user of this process."""
    return found.st_uid == os.geteuid() or found.st_uid == _my_user_id_in(folder)


@cache
def _my_user_id_in(folder: Path) -> int:
    """Return the user id that a new file in a folder gets.

    Some file systems (sshfs, mounts of virtual machines, NFS for root) show another one.
    """
    with suppress(OSError), tempfile.TemporaryFile(dir=folder) as file:
        return os.fstat(file.fileno()).st_uid
    return os.geteuid()


def describe_owner(user_id: int) -> str:
    """Return a user's name, or the number of one who has no name here."""
    try:
        return pwd.getpwuid(user_id).pw_name
    except KeyError:
        return f"user {user_id}"


def find_foreign_owner(path: Path) -> str | None:
    """Return the name of the other user whom a path belongs to; None if it is ours or missing.

    A link counts as itself, not as what it leads to.
    """
    try:
        found = path.lstat()
    except FileNotFoundError:
        return None
    return None if is_mine(found, path.parent) else describe_owner(found.st_uid)


def check_mine(path: Path, remedy: str) -> None:
    """Raise ForeignOwnerError if a path belongs to another user; one that is missing is fine."""
    if owner := find_foreign_owner(path):
        raise ForeignOwnerError(f"{path}: belongs to {owner}, so it is not used; {remedy}")


def keep_others_from_writing() -> None:
    """Let only the user of this process write what it makes from now on, whatever the umask was."""
    os.umask(os.umask(0o077) | OTHERS_WRITE)


def close_to_others(folder: Path) -> list[Path]:
    """Take the right to write in a folder of ours, and in all that is in it, from other users.

    What they put there while it was open to them is renamed: `claims` of theirs would keep us from
    submitting, their `attempts` would end ours, our job would go on from their checkpoint. Returns
    the new names.
    """
    _take_right_to_write(folder, folder.stat())
    # Only now, as nobody can add more.
    with os.scandir(folder) as entries:
        paths = [Path(entry) for entry in entries]
    aside = []
    for path in paths:
        # Another process of ours renames and removes its temporary files meanwhile.
        with suppress(FileNotFoundError):
            aside += _close_entry(path)
    return aside


def _close_entry(path: Path) -> list[Path]:
    found = path.lstat()
    if not is_mine(found, path.parent):
        return [] if _SET_ASIDE.search(path.name) else [_set_aside(path, found.st_uid)]
    if stat.S_ISDIR(found.st_mode):
        return close_to_others(path)
    if stat.S_ISREG(found.st_mode):
        _take_right_to_write(path, found)
    return []


def _take_right_to_write(path: Path, found: os.stat_result) -> None:
    if found.st_mode & OTHERS_WRITE:
        path.chmod(found.st_mode & ~OTHERS_WRITE & 0o7777)


def _set_aside(path: Path, user_id: int) -> Path:
    """Rename what another user put into a folder of ours; return the new name."""
    number = next(n for n in count(1) if not os.path.lexists(f"{path}.of-{user_id}-{n}"))
    return path.rename(f"{path}.of-{user_id}-{number}")


@contextmanager
def open_folder_below(root: Path, parts: Sequence[str]) -> Iterator[int]:
    """Yield a descriptor of the folder `root/parts...`. No part below the root may be a link.

    Raises:
        OSError: a part is missing, a link, or no folder.
    """
    descriptor = os.open(root, os.O_RDONLY | os.O_DIRECTORY)
    try:
        for part in parts:
            inner = os.open(part, _FOLDER, dir_fd=descriptor)
            os.close(descriptor)
            descriptor = inner
        yield descriptor
    finally:
        os.close(descriptor)
