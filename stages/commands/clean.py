"""The command `clean`: list what a run root holds and nothing needs, and remove it on request."""

import os
import re
import shutil
import stat
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from pipeline import config, manifest
from pipeline.manifest import ManifestEntry
from stages import STAGES
from stages.commands.reproduction import all_runs

# Given run folders with their run ids, return the active ones with the reason.
FindActiveRuns = Callable[[Mapping[Path, str]], Mapping[Path, str]]

# Files that changed within this time may be in use.
IDLE_S = 3600.0

_RUN_FOLDER = re.compile(r"[^.].*-([0-9a-f]{12})")

# Names under which files are written before they are renamed (`pipeline.files`, checkpoints).
_TEMPORARY = re.compile(r"\..+\.(tmp|[0-9a-f]{32})")


@dataclass(frozen=True)
class Leftover:
    """A file or folder, why nothing needs it, its size, and when it last changed (Unix time)."""

    path: Path
    why: str
    bytes: int
    changed: float


def planned_run_ids(
    reproduction: str, overrides: Sequence[str] | None, others: Sequence[str]
) -> set[str]:
    """Return the run ids of a reproduction, of `others`, and of all bundled ones."""
    runs = all_runs(reproduction, overrides)
    for name in (*others, *config.list_bundled()):
        runs += all_runs(name)
    return {run.run_id for run in runs}


def clean_run_root(
    root: Path, keep: set[str], find_active: FindActiveRuns, *, yes: bool
) -> Iterator[str]:
    """Return a line for each leftover, which is removed if `yes`, and a total."""
    from mugs.checkpoint.space import format_bytes

    leftovers, kept = find_leftovers(root, keep, find_active)
    folders = find_run_folders(root)
    removed = 0
    for leftover in leftovers:
        line = f"{format_bytes(leftover.bytes):>12}  {leftover.path}: {leftover.why}"
        if not yes:
            yield line
        elif _is_in_use(leftover, folders, find_active):
            yield f"{line}; in use by now, stays"
        else:
            remove_leftover(leftover.path)
            removed += leftover.bytes
            yield f"{line}; removed"
    yield from (f"stays: {line}" for line in kept)
    total = format_bytes(sum(leftover.bytes for leftover in leftovers))
    places = f"{total} in {len(leftovers)} places; --yes removes them"
    yield f"{format_bytes(removed)} removed" if yes else places


def _is_in_use(
    leftover: Leftover, folders: Mapping[Path, str], find_active: FindActiveRuns
) -> bool:
    """Return whether a leftover came into use after it was found.

    Removing many folders takes minutes, in which somebody may submit a run again.
    """
    around = (leftover.path, *leftover.path.parents)
    run_folder = {folder: folders[folder] for folder in around if folder in folders}
    active = bool(find_active(run_folder))
    return active or not is_idle(measure_leftover(leftover.path, leftover.why))


def find_leftovers(
    root: Path, planned: set[str], find_active: FindActiveRuns
) -> tuple[list[Leftover], list[str]]:
    """Return what may be removed, and a line for each unneeded run folder that stays.

    `planned` are the run ids to keep.
    """
    folders = find_run_folders(root)
    # An entry that cannot be read protects its run too: its name is enough for `recorded`.
    recorded = set(manifest.list_run_ids(root))
    entries = [entry for run_id in sorted(recorded) if (entry := manifest.read_entry(root, run_id))]
    # Outputs of other finished runs may lie anywhere in the run root.
    needed = {entry.output(label) for entry in entries for label in entry.outputs}
    active = find_active(folders)
    unasked = {folder for folder, run_id in folders.items() if run_id not in planned | recorded}

    found: list[Leftover] = []
    kept: list[str] = []
    candidates: list[tuple[Path, str]] = []
    for folder in sorted(unasked):
        if folder in active:
            kept.append(f"{folder}: {active[folder]}")
        else:
            candidates.append((folder, "no reproduction asks for it"))
    # Folders that go as a whole, or stay as a whole, are not searched for temporary files.
    temporaries = find_temporaries(root, folders, unasked | set(active))
    candidates += [(path, "left over from an interrupted write") for path in temporaries]
    for entry in entries:
        # With an output missing, the run will be repeated and can resume from its checkpoints.
        if entry.run_dir not in active and not manifest.find_problems(entry):
            candidates += [(path, "its run is done") for path in list_old_checkpoints(entry)]

    # Measured last, since that visits every file of a folder.
    for path, why in candidates:
        leftover = measure_leftover(path, why)
        if is_idle(leftover) and not any(_overlaps(path, output) for output in needed):
            found.append(leftover)
        elif path in unasked:
            reason = "changed within the last hour, or another run's output lies in it"
            kept.append(f"{path}: {reason}")
    return found, kept


def _overlaps(path: Path, output: Path) -> bool:
    """Return whether one of two paths contains the other."""
    return path in (output, *output.parents) or output in path.parents


def find_run_folders(root: Path) -> dict[Path, str]:
    """Return the run folders of all stages with their run ids; links are not followed."""
    places = [place for stage in STAGES if (place := root / stage).is_dir()]
    folders = [path for place in places for path in place.iterdir() if _is_folder(path)]
    return {path: name[1] for path in folders if (name := _RUN_FOLDER.fullmatch(path.name))}


def find_temporaries(root: Path, folders: Iterable[Path], skip: set[Path]) -> Iterator[Path]:
    """Return the temporary files and folders of interrupted writes, only the topmost of each."""
    for place in (root, root / "manifest", root / "code", *(root / stage for stage in STAGES)):
        if place.is_dir():
            yield from sorted(path for path in place.iterdir() if _TEMPORARY.fullmatch(path.name))
    for folder in sorted(set(folders) - skip):
        for current, names, files in os.walk(folder):
            for name in sorted([*names, *files]):
                if _TEMPORARY.fullmatch(name):
                    yield Path(current, name)
            # os.walk descends into what is left in `names`.
            names[:] = [name for name in names if not _TEMPORARY.fullmatch(name)]


def list_old_checkpoints(entry: ManifestEntry) -> list[Path]:
    """Return all checkpoints of a finished run but the last, and the bad ones that were set aside.

    A run with `keep_every_epochs` keeps its checkpoints for other runs, so none is returned.
    """
    from mugs.checkpoint.record import list_checkpoints

    folder = entry.run_dir / "checkpoints"
    if entry.config.get("keep_every_epochs"):
        return []
    return [*list_checkpoints(folder)[:-1], *sorted(folder.glob("bad_step_*"))]


def measure_leftover(path: Path, why: str) -> Leftover:
    """Return a path with the size of all files in it and the time of the newest change."""
    stats = []
    for inner in [path, *path.rglob("*")] if _is_folder(path) else [path]:
        with suppress(FileNotFoundError):  # removed meanwhile
            stats.append(inner.lstat())
    size = sum(found.st_size for found in stats if not stat.S_ISDIR(found.st_mode))
    # What vanished altogether counts as changed now, so it is left alone.
    changed = max((found.st_mtime for found in stats), default=time.time())
    return Leftover(path, why, size, changed)


def is_idle(leftover: Leftover) -> bool:
    """Return whether nothing in it changed lately."""
    return time.time() - leftover.changed > IDLE_S


def remove_leftover(path: Path) -> None:
    """Remove a file or folder."""
    from mugs.checkpoint.record import remove_checkpoint

    if not _is_folder(path):
        path.unlink(missing_ok=True)
    elif _TEMPORARY.fullmatch(path.name):
        shutil.rmtree(path, ignore_errors=True)
    else:
        # Renames the folder first: half-removed, it would still look like a run or a checkpoint.
        remove_checkpoint(path)


def _is_folder(path: Path) -> bool:
    return path.is_dir() and not path.is_symlink()
