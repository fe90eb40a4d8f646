"""What keepers leave behind (`slurm/keeper.py`), for those who only look."""

import os
from collections.abc import Iterator, Sequence
from pathlib import Path

from pipeline.files import read_json
from pipeline.ownership import find_foreign_owner
from pipeline.spec import StageRun

PROGRESS = ".progress.json"
END = ".end.json"
_FIELDS: dict[str, type] = {"runs": dict, "state": str, "reasons": list}


def find_keeper_folder(run_root: Path) -> Path:
    """Return the folder of this user's keepers."""
    return run_root / "keepers" / str(os.geteuid())


def list_ended_keepers(runs: Sequence[StageRun], run_root: Path) -> Iterator[str]:
    """Yield a line for each keeper of these runs that has ended, with the reason."""
    for note in _find_notes(runs, run_root):
        path = note.with_suffix(END)
        if path.exists():
            end = read_json(path, _FIELDS) or {}
            reasons = "; ".join(map(str, end.get("reasons") or ()))
            yield f"keeper: {end.get('state', 'unreadable')}{f': {reasons}' if reasons else ''}"


def list_open_keepers(runs: Sequence[StageRun], run_root: Path) -> list[str]:
    """Return the names of the jobs of keepers of these runs that have not ended with a reason."""
    notes = _find_notes(runs, run_root)
    return [note.stem for note in notes if not note.with_suffix(END).exists()]


def _find_notes(runs: Sequence[StageRun], run_root: Path) -> Iterator[Path]:
    ids = {run.run_id for run in runs}
    folder = find_keeper_folder(run_root)
    if find_foreign_owner(folder):
        return
    for path in sorted(folder.glob("*.json")):
        if path.name.endswith((PROGRESS, END)):
            continue
        note = read_json(path, _FIELDS) or {}
        kept = {str(name).rpartition("-")[2] for name in note.get("runs") or {}}
        if kept & ids:
            yield path
