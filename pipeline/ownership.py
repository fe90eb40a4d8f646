"""Whose a file is, and folders that are reached without following a link.

A run root may be shared. What another user put there may be read as data, but it is not ours: we
neither continue, run nor remove it (docs/security.md).
"""

import os
import pwd
import re
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


def close_to_others(folder: Path) -> None:
    """Take the right to write in a folder of ours, and in the folders in it, from other users."""
    with os.scandir(folder) as entries:
        inner = [Path(entry) for entry in entries if entry.is_dir(follow_symlinks=False)]
    for path in (folder, *inner):
        mode = path.stat().st_mode
        if mode & OTHERS_WRITE and find_foreign_owner(path) is None:
            path.chmod(mode & ~OTHERS_WRITE & 0o7777)


def set_foreign_aside(folder: Path) -> list[Path]:
    """Rename what other users put into a folder of ours; return the new names.

    They could put it there while the folder was open to them. `claims` of theirs would keep us from
    submitting, their `attempts` would end ours.
    """
    with os.scandir(folder) as entries:
        found = [
            (Path(entry), entry.stat(follow_symlinks=False).st_uid)
            for entry in entries
            if find_foreign_owner(Path(entry)) and not _SET_ASIDE.search(entry.name)
        ]
    aside = []
    for path, user_id in found:
        number = next(n for n in count(1) if not os.path.lexists(f"{path}.of-{user_id}-{n}"))
        aside.append(path.rename(f"{path}.of-{user_id}-{number}"))
    return aside


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
