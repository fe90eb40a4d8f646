"""The leftovers of a run root, in words; removed where that is wanted."""

import os
import re
import shutil
import stat
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path

from pipeline import config, manifest
from pipeline.manifest import ManifestEntry
from stages import STAGES
from stages.commands.reproduction import all_runs


def planned_run_ids(
    reproduction: str, overrides: Sequence[str] | None, others: Sequence[str]
) -> set[str]:
    """Ids of the runs of a reproduction with its overrides, of others, and of all that are bundled."""
    runs = all_runs(reproduction, overrides)
    for name in (*others, *config.bundled()):
        runs += all_runs(name)
    return {run.run_id for run in runs}


FindActiveRuns = Callable[[Mapping[Path, str]], Mapping[Path, str]]
"""Which of some run folders (with their run ids) are queued or running, and how."""


def clean_run_root(root: Path, keep: set[str], busy: FindActiveRuns, *, yes: bool) -> Iterator[str]:
    """A line per leftover, removed with `yes`, and the sum; what is in use by then stays."""
    from mugs.checkpoint.space import format_bytes

    leftovers, folders = find_leftovers(root, keep, busy), find_run_folders(root)
    removed = 0
    for each in leftovers.found:
        line = f"{format_bytes(each.bytes):>12}  {each.path}: {each.why}"
        around = {
            place: folders[place] for place in (each.path, *each.path.parents) if place in folders
        }
        if yes and (busy(around) or not is_idle(measure_leftover(each.path, each.why))):
            yield f"{line}; in use by now, stays"
        elif yes:
            remove_leftover(each)
            removed += each.bytes
            yield f"{line}; removed"
        else:
            yield line
    yield from (f"stays: {line}" for line in leftovers.kept)
    total = format_bytes(removed if yes else leftovers.bytes)
    yield (
        f"{total} removed"
        if yes
        else f"{total} in {len(leftovers.found)} places; --yes removes them"
    )


IDLE_S = 3600.0
"""What changed within this time may be in use."""


_RUN = re.compile(r".+-([0-9a-f]{12})")


_TEMPORARY = re.compile(r"\..+\.(tmp|[0-9a-f]{32})")


@dataclass(frozen=True)
class Leftover:
    """A file or folder, its bytes, when it changed last (Unix time), and why nothing needs it."""

    path: Path
    why: str
    bytes: int
    changed: float


@dataclass
class Leftovers:
    """What may be removed, and a line for each run folder that no reproduction asks for and that stays."""

    found: list[Leftover] = field(default_factory=list)
    kept: list[str] = field(default_factory=list)

    @property
    def bytes(self) -> int:
        """Of all that may be removed."""
        return sum(each.bytes for each in self.found)


def find_leftovers(root: Path, planned: set[str], busy: FindActiveRuns) -> Leftovers:
    """Look through a run root; `planned`: ids of the runs that some reproduction asks for."""
    folders = find_run_folders(root)
    recorded = set(manifest.list_run_ids(root))
    entries = [entry for run_id in sorted(recorded) if (entry := manifest.read_entry(root, run_id))]
    needed = {entry.output(label) for entry in entries for label in entry.outputs}
    in_use = busy(folders)
    result = Leftovers()
    unasked = {folder for folder, run_id in folders.items() if run_id not in planned | recorded}
    candidates: list[tuple[Path, str]] = []
    for folder in sorted(unasked):
        if folder in in_use:
            result.kept.append(f"{folder}: {in_use[folder]}")
        else:
            candidates.append((folder, "no reproduction asks for it"))
    whole = unasked | set(in_use)
    candidates += [
        (path, "left over from an interrupted write")
        for path in find_temporaries(root, folders, whole)
    ]
    for entry in entries:
        if entry.run_dir not in in_use and not manifest.find_problems(entry):
            candidates += [(path, "its run is done") for path in list_old_checkpoints(entry)]
    for path, why in candidates:
        each = measure_leftover(path, why)
        if not any(
            path in (output, *output.parents) or output in path.parents for output in needed
        ) and is_idle(each):
            result.found.append(each)
        elif path in unasked:
            result.kept.append(
                f"{path}: changed within the last hour, or another run's output lies in it"
            )
    return result


def find_run_folders(root: Path) -> dict[Path, str]:
    """Folders of runs of the stages there are, with their run ids; links are not followed."""
    places = [place for stage in STAGES if (place := root / stage).is_dir()]
    inside = [
        path
        for place in places
        for path in place.iterdir()
        if path.is_dir() and not path.is_symlink()
    ]
    return {
        path: found[1]
        for path in inside
        if (found := _RUN.fullmatch(path.name)) and path.name[0] != "."
    }


def find_temporaries(root: Path, folders: Iterable[Path], skip: set[Path]) -> Iterator[Path]:
    """What writes begin with and rename at their end, the topmost of each."""
    stages = [root / stage for stage in STAGES]
    for place in (root, root / "manifest", root / "code", *stages):
        if place.is_dir():
            yield from sorted(path for path in place.iterdir() if _TEMPORARY.fullmatch(path.name))
    for folder in sorted(set(folders) - skip):
        for current, names, files in os.walk(folder):
            yield from (
                Path(current, name)
                for name in sorted([*names, *files])
                if _TEMPORARY.fullmatch(name)
            )
            names[:] = [name for name in names if not _TEMPORARY.fullmatch(name)]


def list_old_checkpoints(entry: ManifestEntry) -> list[Path]:
    """Checkpoints of a finished run but the last, and those set aside; none where some are kept for good."""
    from mugs.checkpoint.record import list_checkpoints

    folder = entry.run_dir / "checkpoints"
    if entry.config.get("keep_every_epochs"):
        return []
    return [*list_checkpoints(folder)[:-1], *sorted(folder.glob("bad_step_*"))]


def measure_leftover(path: Path, why: str) -> Leftover:
    """With the size and age of all that is in it."""
    stats = []
    for each in [path, *path.rglob("*")] if path.is_dir() and not path.is_symlink() else [path]:
        with suppress(FileNotFoundError):  # removed meanwhile
            stats.append(each.lstat())
    size = sum(found.st_size for found in stats if not stat.S_ISDIR(found.st_mode))
    return Leftover(path, why, size, max((found.st_mtime for found in stats), default=time.time()))


def is_idle(each: Leftover) -> bool:
    """Whether nothing in it changed lately."""
    return time.time() - each.changed > IDLE_S


def remove_leftover(each: Leftover) -> None:
    """Remove it; a folder is first renamed, so that at no moment a part of it looks whole."""
    from mugs.checkpoint.record import remove_checkpoint as remove_folder

    if (
        each.path.is_dir()
        and not each.path.is_symlink()
        and not _TEMPORARY.fullmatch(each.path.name)
    ):
        remove_folder(each.path)
    elif each.path.is_dir() and not each.path.is_symlink():
        shutil.rmtree(each.path, ignore_errors=True)
    else:
        each.path.unlink(missing_ok=True)
