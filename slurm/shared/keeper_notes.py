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
    ids = {run.run_id for run in runs}
    for path in sorted(find_keeper_folder(run_root).glob(f"*{END}")):
        note = read_json(path.with_name(path.name.removesuffix(END) + ".json")) or {}
        kept = {str(folder).rpartition("-")[2] for folder in note.get("runs", {})}
        if kept & ids:
            end = read_json(path) or {}
            reasons = "; ".join(map(str, end.get("reasons", ())))
            yield f"keeper: {end.get('state', 'unreadable')}{f': {reasons}' if reasons else ''}"
