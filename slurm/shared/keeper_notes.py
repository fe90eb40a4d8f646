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
    """Yield a line for each keeper of these runs that has ended, with the reason.

    Not for one whose runs a later keeper has taken over. One that kept only some says how many.
    """
    ids = {run.run_id for run in runs}
    notes = list(_find_notes(ids, run_root))
    taken_over = {run_id for note, kept in notes if not _has_ended(note) for run_id in kept}
    for note, kept in notes:
        if not _has_ended(note) or kept <= taken_over:
            continue
        end = read_json(note.with_suffix(END), _FIELDS) or {}
        reasons = "; ".join(map(str, end.get("reasons") or ()))
        share = "" if ids <= kept else f" with {len(kept & ids)} of {len(ids)} runs"
        state = f"{end.get('state', 'unreadable')}{share}"
        yield f"keeper: {state}{f': {reasons}' if reasons else ''}"


def list_open_keepers(runs: Sequence[StageRun], run_root: Path) -> list[str]:
    """Return the names of the jobs of keepers of these runs that have not ended with a reason."""
    notes = _find_notes({run.run_id for run in runs}, run_root)
    return [note.stem for note, _ in notes if not _has_ended(note)]


def _has_ended(note: Path) -> bool:
    return note.with_suffix(END).exists()


def _find_notes(ids: set[str], run_root: Path) -> Iterator[tuple[Path, set[str]]]:
    """Yield the notes of keepers that keep some of these runs, and the ids of all their runs."""
    folder = find_keeper_folder(run_root)
    if find_foreign_owner(folder):
        return
    for path in sorted(folder.glob("*.json")):
        if path.name.endswith((PROGRESS, END)):
            continue
        note = read_json(path, _FIELDS) or {}
        kept = {str(name).rpartition("-")[2] for name in note.get("runs") or {}}
        if kept & ids:
            yield path, kept
