"""Look through the checkpoints of a run and put right what can be put right; no torch."""

import time
from dataclasses import dataclass, field
from pathlib import Path

from mugs.checkpoint.record import (
    CheckpointError,
    delete_leftovers,
    list_checkpoints,
    list_leftovers,
    quarantine_checkpoint,
    verify_checkpoint,
)

IN_USE_S = 3600.0
"""A leftover that changed within this time may be a write in progress."""


@dataclass
class Inspection:
    """How many checkpoints are good, a line for each problem that is there, and for each that was there."""

    good: int = 0
    problems: list[str] = field(default_factory=list)
    repaired: list[str] = field(default_factory=list)


def inspect_checkpoints(folder: Path, *, repair: bool = False) -> Inspection:
    """Verify every checkpoint in a folder.

    With `repair`, leftovers of interrupted writes are removed and bad checkpoints set aside as `bad_...`; not where no
    good one is left, since a run would then start over without a word.
    """
    found, bad = Inspection(), {}
    for path in list_checkpoints(folder):
        try:
            verify_checkpoint(path)
            found.good += 1
        except CheckpointError as error:
            if path.exists():  # a running training may have removed it just now
                bad[path] = str(error)
    for path, problem in bad.items():
        if repair and found.good:
            found.repaired.append(f"{problem}; set aside as {quarantine_checkpoint(path).name}")
        else:
            found.problems.append(
                problem + ("" if found.good else "; there is no good one to go on from")
            )
    old = [path for path in list_leftovers(folder) if _idle(path)]
    if repair:
        delete_leftovers(old)
    for path in old:
        (found.problems if path.exists() else found.repaired).append(
            f"{path}: left over from an interrupted write"
        )
    return found


def _idle(path: Path) -> bool:
    """Whether nothing in a leftover changed lately."""
    try:
        newest = max(p.stat().st_mtime for p in (path, *path.glob("*")))
    except OSError:
        return False
    return time.time() - newest > IN_USE_S
