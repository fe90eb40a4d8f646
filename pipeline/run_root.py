"""What makes a folder a run root: a marker, which `run` and `submit` write. And its folders."""

import os
import stat
from contextlib import suppress
from pathlib import Path

from pipeline.files import make_folder, write_atomic
from pipeline.ownership import OTHERS_WRITE, check_mine

MARKER = ".mugs-run-root"
_TEXT = "A run root of mugs-repro. Only in folders with this file does `clean` remove anything.\n"


def mark_run_root(root: Path) -> None:
    """Make a folder a run root, if it is none yet."""
    if not is_run_root(root):
        write_atomic(root / MARKER, _TEXT)


def is_run_root(root: Path) -> bool:
    """Return whether a folder is a run root."""
    return (root / MARKER).is_file()


def name_snapshot_folder() -> str:
    """Return the name of the folder with this user's snapshots of the code.

    It lies directly in the run root: the owner of a folder in between could rename it.
    """
    return f"code-{os.geteuid()}"


def make_shared_folder(root: Path, name: str) -> Path:
    """Make a folder of the run root in which every user of it may make files; return it.

    It gets the rights of the run root, whatever the umask. If others may write there, it is sticky:
    nobody but its owner renames or removes what is another user's.

    Raises:
        ForeignOwnerError: another user has put a link there, which leads to where they want.
    """
    path = root / name
    if path.is_symlink():
        check_mine(path, "have the link removed, or use a run root of your own")
    # One that is there keeps its rights, but earlier versions made it without the sticky bit.
    model = path if path.is_dir() else root
    make_folder(path)
    mode = stat.S_IMODE(model.stat().st_mode)
    if mode & OTHERS_WRITE and stat.S_IMODE(path.stat().st_mode) != mode | stat.S_ISVTX:
        # Another user may have made it a moment ago: then it is theirs to change.
        with suppress(PermissionError):
            path.chmod(mode | stat.S_ISVTX)
    return path
