"""What makes a folder a run root: a marker, which `run` and `submit` write. And its folders."""

import stat
from contextlib import suppress
from pathlib import Path

from pipeline.files import make_folder, write_atomic

MARKER = ".mugs-run-root"
_TEXT = "A run root of mugs-repro. Only in folders with this file does `clean` remove anything.\n"


def mark_run_root(root: Path) -> None:
    """Make a folder a run root, if it is none yet."""
    if not is_run_root(root):
        write_atomic(root / MARKER, _TEXT)


def is_run_root(root: Path) -> bool:
    """Return whether a folder is a run root."""
    return (root / MARKER).is_file()


def make_shared_folder(root: Path, name: str) -> Path:
    """Make a folder of the run root in which every user of it may make files; return it.

    It gets the rights of the run root, whatever the umask. If others may write there, it is sticky:
    nobody renames or removes what is another user's.
    """
    path = root / name
    if path.is_dir():
        return path
    make_folder(path)
    mode = stat.S_IMODE(root.stat().st_mode)
    if mode & (stat.S_IWGRP | stat.S_IWOTH):
        # Another user may have made it a moment ago: then it is theirs to change.
        with suppress(PermissionError):
            path.chmod(mode | stat.S_ISVTX)
    return path
