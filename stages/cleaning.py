"""The leftovers of a run root, in words; removed where that is wanted."""

from collections.abc import Iterator, Sequence
from pathlib import Path

from pipeline import config
from stages.leftovers import Busy, find, idle, measured, remove, run_folders
from stages.reproduction import all_runs


def planned(reproduction: str, overrides: Sequence[str] | None, others: Sequence[str]) -> set[str]:
    """Ids of the runs of a reproduction with its overrides, of others, and of all that are bundled."""
    runs = all_runs(reproduction, overrides)
    for name in (*others, *config.bundled()):
        runs += all_runs(name)
    return {run.run_id for run in runs}


def clean(root: Path, keep: set[str], busy: Busy, *, yes: bool) -> Iterator[str]:
    """A line per leftover, removed with `yes`, and the sum; what is in use by then stays."""
    from mugs.storage.space import gigabytes

    leftovers, folders = find(root, keep, busy), run_folders(root)
    removed = 0
    for each in leftovers.found:
        line = f"{gigabytes(each.bytes):>12}  {each.path}: {each.why}"
        around = {
            place: folders[place] for place in (each.path, *each.path.parents) if place in folders
        }
        if yes and (busy(around) or not idle(measured(each.path, each.why))):
            yield f"{line}; in use by now, stays"
        elif yes:
            remove(each)
            removed += each.bytes
            yield f"{line}; removed"
        else:
            yield line
    yield from (f"stays: {line}" for line in leftovers.kept)
    total = gigabytes(removed if yes else leftovers.bytes)
    yield (
        f"{total} removed"
        if yes
        else f"{total} in {len(leftovers.found)} places; --yes removes them"
    )
