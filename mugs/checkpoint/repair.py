"""Check the checkpoints of a run, and repair what can be repaired. Does not import torch."""

from dataclasses import dataclass, field
from pathlib import Path

from mugs.checkpoint.record import (
    CheckpointError,
    CheckpointReadError,
    delete_leftovers,
    list_checkpoints,
    list_leftovers,
    quarantine_checkpoint,
    verify_checkpoint,
)
from pipeline.files import FormatVersionError, read_server_time

IN_USE_S = 3600.0
"""A leftover that changed within this time may be a write in progress."""


@dataclass
class Inspection:
    """The number of good checkpoints, and a line for each problem found or repaired."""

    good: int = 0
    problems: list[str] = field(default_factory=list)
    repaired: list[str] = field(default_factory=list)


def inspect_checkpoints(folder: Path, *, repair: bool = False) -> Inspection:
    """Verify every checkpoint in a folder.

    With `repair`, leftovers of interrupted writes are removed and bad checkpoints are renamed to
    `bad_...`. Bad ones stay if there is no good one: without any the run would start over in
    silence. Those that the disk could not read stay too: they may be good.
    """
    found = Inspection()
    bad = {}
    for path in list_checkpoints(folder):
        try:
            verify_checkpoint(path)
            found.good += 1
        except FormatVersionError as error:
            # Good for other code, so it is neither set aside nor counted.
            found.problems.append(str(error))
        except (CheckpointReadError, OSError) as error:
            # The disk stumbled, which says nothing about the checkpoint.
            found.problems.append(f"{error}; {path.name} may be good, so it stays")
        except CheckpointError as error:
            # A running training may have removed it just now.
            if path.exists():
                bad[path] = str(error)
    # All are verified first: whether one may be renamed depends on whether another one is good.
    for path, problem in bad.items():
        if repair and found.good:
            found.repaired.append(f"{problem}; set aside as {quarantine_checkpoint(path).name}")
        else:
            found.problems.append(
                problem + ("" if found.good else "; there is no good one to resume from")
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
    """Return whether nothing in a leftover changed recently."""
    try:
        # A write in progress changes the files in the folder, not always the folder itself.
        newest = max(p.stat().st_mtime for p in (path, *path.glob("*")))
    except OSError:
        return False
    # Not by the clock of this host: if it is a day ahead, a write in progress would look old.
    return read_server_time(path.parent) - newest > IN_USE_S
