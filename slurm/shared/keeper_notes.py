"""What keepers leave behind (`slurm/keeper.py`), for those who only look."""

import os
from collections.abc import Iterator, Sequence
from pathlib import Path

from pipeline.files import read_json
from pipeline.spec import StageRun

PROGRESS = ".progress.json"
END = ".end.json"


def find_keeper_folder(run_root: Path) -> Path:
    """Return the folder of this user's keepers."""
    return run_root / "keepers" / str(os.geteuid())


def list_ended_keepers(runs: Sequence[StageRun], run_root: Path) -> Iterator[str]:
    """Yield a line for each keeper of these runs that has ended, with the reason."""
    for note in _find_notes(runs, run_root):
        path = note.with_suffix(END)
        if path.exists():
            end = read_json(path) or {}
            reasons = "; ".join(map(str, end.get("reasons", ())))
            yield f"keeper: {end.get('state', 'unreadable')}{f': {reasons}' if reasons else ''}"


def list_open_keepers(runs: Sequence[StageRun], run_root: Path) -> list[str]:
    """Return the names of the jobs of keepers of these runs that have not ended with a reason."""
    notes = _find_notes(runs, run_root)
    return [note.stem for note in notes if not note.with_suffix(END).exists()]


def _find_notes(runs: Sequence[StageRun], run_root: Path) -> Iterator[Path]:
    ids = {run.run_id for run in runs}
    for path in sorted(find_keeper_folder(run_root).glob("*.json")):
        if path.name.endswith((PROGRESS, END)):
            continue
        kept = {
            str(folder).rpartition("-")[2] for folder in (read_json(path) or {}).get("runs", {})
        }
        if kept & ids:
            yield path
