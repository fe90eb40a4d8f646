"""What makes a folder a run root: a marker, which `run` and `submit` write."""

from pathlib import Path

from pipeline.files import write_atomic

MARKER = ".mugs-run-root"
_TEXT = "A run root of mugs-repro. Only in folders with this file does `clean` remove anything.\n"


def mark_run_root(root: Path) -> None:
    """Make a folder a run root, if it is none yet."""
    if not is_run_root(root):
        write_atomic(root / MARKER, _TEXT)


def is_run_root(root: Path) -> bool:
    """Return whether a folder is a run root."""
    return (root / MARKER).is_file()
