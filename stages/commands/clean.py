"""The command `clean`: list what a run root holds and nothing needs, and remove it on request."""

import os
import re
import stat
import time
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from pipeline import config, manifest, runfile
from pipeline.files import FormatVersionError, read_server_time
from pipeline.manifest import ManifestEntry
from pipeline.ownership import find_foreign_owner
from pipeline.run_root import MARKER, is_run_root, name_snapshot_folder
from pipeline.spec import ConfigError
from stages import STAGES
from stages.commands.reproduction import all_runs
from stages.commands.trash import KEEP_DAYS, Trash

# Given run folders with their run ids, return the active ones with the reason.
FindActiveRuns = Callable[[Mapping[Path, str]], Mapping[Path, str]]

# Files that changed within this time may be in use.
IDLE_S = 3600.0

_RUN_FOLDER = re.compile(r"[^.].*-([0-9a-f]{12})")

# Names under which files are written before they are renamed (`pipeline.files`, checkpoints).
_TEMPORARY = re.compile(r"\..+\.[0-9a-f]{8}\.tmp")
# What is written in these places, outside run folders, and so may be left there half-written.
_TEMPORARY_IN = {
    "": re.compile(rf"\.(report\.html|{re.escape(MARKER)})\.[0-9a-f]{{8}}\.tmp"),
    "manifest": re.compile(r"\.[0-9a-f]{12}\.json\.[0-9a-f]{8}\.tmp"),
    name_snapshot_folder(): re.compile(r"\.[0-9a-f]{12}\.[0-9a-f]{8}\.tmp"),
}


@dataclass(frozen=True)
class Leftover:
    """A file or folder, why nothing needs it, its size, and when it last changed (Unix time).

    `run` is the folder name of the run whose checkpoints it holds, or ""; only if that is typed are
    they removed.
    """

    path: Path
    why: str
    bytes: int
    changed: float
    run: str = ""


def planned_run_ids(
    reproduction: str,
    overrides: Sequence[str] | None,
    others: Sequence[str],
    seeds: Sequence[str] | None = None,
) -> set[str]:
    """Return the run ids of a reproduction, of `others`, and of all bundled ones."""
    runs = all_runs(reproduction, overrides, seeds)
    for name in (*others, *config.list_bundled()):
        runs += all_runs(name)
    return {run.run_id for run in runs}


def clean_run_root(
    root: Path,
    keep: set[str],
    find_active: FindActiveRuns,
    *,
    yes: bool,
    checkpoints_of: Collection[str] = (),
    empty_trash: bool = False,
) -> Iterator[str]:
    """Return a line for each leftover, which is moved to the trash if `yes`, and a total.

    Checkpoints are only moved if `checkpoints_of` names the folder of their run.

    Raises:
        ConfigError: `root` is no run root, or a name in `checkpoints_of` is of no leftover.
    """
    from mugs.checkpoint.space import format_bytes

    check_marker(root)
    leftovers, kept = find_leftovers(root, keep, find_active)
    check_names(checkpoints_of, leftovers)
    folders = find_run_folders(root) if yes else {}
    trash = Trash(root)
    moved = 0
    for leftover in leftovers:
        line = f"{format_bytes(leftover.bytes):>12}  {leftover.path}: {leftover.why}"
        untyped = leftover.run and leftover.run not in checkpoints_of
        if untyped:
            yield f"{line}; holds checkpoints, --checkpoints {leftover.run} removes them"
        elif not yes:
            yield line
        elif _is_in_use(leftover, folders, find_active):
            yield f"{line}; in use by now, stays"
        else:
            problem = _move_to_trash(leftover, trash)
            moved += 0 if problem else leftover.bytes
            yield f"{line}; {problem or 'moved to the trash'}"
    yield from (f"stays: {line}" for line in kept)
    yield from _clean_trash(trash, root, yes=yes, everything=empty_trash)
    total = format_bytes(sum(leftover.bytes for leftover in leftovers))
    places = f"{total} in {len(leftovers)} places; --yes moves them to {trash.folder}"
    done = f"{format_bytes(moved)} moved to the trash{'' if empty_trash else f', {trash.place}'}"
    yield done if yes else places


def check_marker(root: Path) -> None:
    """Raise ConfigError unless `run` or `submit` has made a folder a run root."""
    if not is_run_root(root):
        raise ConfigError(
            f"{root}: is not a run root, nothing is removed; it has no file {MARKER}, which `run` "
            "and `submit` write (in a run root of an earlier version, create it with `touch`)"
        )


def check_names(names: Iterable[str], leftovers: Iterable[Leftover]) -> None:
    """Raise ConfigError if a name given with --checkpoints is not one of the leftovers."""
    known = sorted({leftover.run for leftover in leftovers if leftover.run})
    for name in names:
        if name not in known:
            raise ConfigError(
                f"--checkpoints {name}: expected the folder name of a run whose checkpoints are "
                f"not needed: {', '.join(known) or 'there is none'}"
            )


def _move_to_trash(leftover: Leftover, trash: Trash) -> str:
    """Move a leftover to the trash, or return why it stays."""
    try:
        trash.move(leftover.path)
    except OSError as error:
        return f"stays: {error}"
    return ""


def _clean_trash(trash: Trash, root: Path, *, yes: bool, everything: bool) -> Iterator[str]:
    """Yield a line for what was moved to the trash long ago, which is deleted if `yes`."""
    for name in trash.list_expired(read_server_time(root), everything=everything):
        line = f"{trash.folder / name}: in the trash"
        if not everything:
            line += f" for more than {KEEP_DAYS} days"
        if yes:
            trash.delete(name)
            line += "; deleted"
        yield line


def _is_in_use(
    leftover: Leftover, folders: Mapping[Path, str], find_active: FindActiveRuns
) -> bool:
    """Return whether a leftover came into use after it was found.

    Removing many folders takes minutes, in which somebody may submit a run again.
    """
    around = (leftover.path, *leftover.path.parents)
    run_folder = {folder: folders[folder] for folder in around if folder in folders}
    active = bool(find_active(run_folder))
    return active or not is_idle(
        measure_leftover(leftover.path, leftover.why), read_server_time(leftover.path.parent)
    )


def find_leftovers(
    root: Path, planned: set[str], find_active: FindActiveRuns
) -> tuple[list[Leftover], list[str]]:
    """Return what may be removed, and a line for each unneeded run folder that stays.

    `planned` are the run ids to keep.
    """
    folders = find_run_folders(root)
    # An entry that cannot be read protects its run too: its name is enough for `recorded`.
    recorded = set(manifest.list_run_ids(root))
    entries, refused = _read_entries(root, sorted(recorded))
    needed = NeededPaths(entry.output(label) for entry in entries for label in entry.outputs)
    active = find_active(folders)
    # Not once for each of thousands of runs.
    asked = planned | recorded
    in_use = set(active)
    unasked = {folder for folder, run_id in folders.items() if run_id not in asked}

    found: list[Leftover] = []
    kept = list(refused)
    candidates: list[tuple[Path, str, str]] = []
    for folder in sorted(unasked, key=_get_parts):
        if folder in active:
            kept.append(f"{folder}: {active[folder]}")
        elif problem := why_not_ours(folder):
            kept.append(f"{folder}: {problem}")
        else:
            run = folder.name if any(folder.glob("checkpoints/step_*")) else ""
            candidates.append((folder, "no reproduction asks for it", run))
    # Folders that go as a whole, or stay as a whole, are not searched for temporary files.
    temporaries = find_temporaries(root, folders, unasked | in_use)
    candidates += [(path, "left over from an interrupted write", "") for path in temporaries]
    for entry in entries:
        candidates += [
            (path, "its run is done", path.parents[1].name)
            for path in list_old_checkpoints(entry, folders, in_use)
        ]

    # Measured last, since that visits every file of a folder.
    now = read_server_time(root)
    for path, why, run in candidates:
        leftover = measure_leftover(path, why, run)
        if is_idle(leftover, now) and not needed.overlap(path):
            found.append(leftover)
        elif path in unasked:
            reason = "changed within the last hour, or another run's output lies in it"
            kept.append(f"{path}: {reason}")
    return found, kept


def _read_entries(root: Path, run_ids: Iterable[str]) -> tuple[list[ManifestEntry], list[str]]:
    """Return the entries that can be read, and a line for each of a newer version."""
    entries = []
    refused = []
    for run_id in run_ids:
        try:
            entry = manifest.read_entry(root, run_id)
        except FormatVersionError as error:
            refused.append(str(error))
            continue
        if entry is not None:
            entries.append(entry)
    return entries, refused


class NeededPaths:
    """Outputs of finished runs, which may lie anywhere in the run root."""

    def __init__(self, outputs: Iterable[Path]) -> None:
        self._outputs = set(outputs)
        # Looked up, not compared one by one: there may be thousands of both.
        self._around = {parent for output in self._outputs for parent in output.parents}

    def overlap(self, path: Path) -> bool:
        """Return whether a path is an output, contains one, or lies in one."""
        return (
            path in self._outputs
            or path in self._around
            or not self._outputs.isdisjoint(path.parents)
        )


def find_run_folders(root: Path) -> dict[Path, str]:
    """Return the folders named like runs of all stages, with their run ids.

    Links are not followed, neither to a stage's folder nor to a run's.
    """
    found = {}
    for stage in STAGES:
        place = root / stage
        if not _is_folder(place):
            continue
        with os.scandir(place) as entries:
            for entry in entries:
                name = _RUN_FOLDER.fullmatch(entry.name)
                if name and entry.is_dir(follow_symlinks=False):
                    found[Path(f"{place}/{entry.name}")] = name[1]
    return found


def why_not_ours(folder: Path) -> str | None:
    """Return why a folder named like a run is not removed; None if it is a run of this user."""
    if owner := find_foreign_owner(folder):
        return f"belongs to {owner}"
    path = folder / runfile.FILE_NAME
    if owner := find_foreign_owner(path):
        return f"its {runfile.FILE_NAME} belongs to {owner}"
    stage, run_id = folder.parent.name, folder.name[-12:]
    if not runfile.begins_as(path, stage, folder.name.removesuffix(f"-{run_id}"), run_id):
        return f"is no run: it has no {runfile.FILE_NAME} of this stage, name and id"
    return None


def find_temporaries(root: Path, folders: Iterable[Path], skip: set[Path]) -> Iterator[Path]:
    """Return the temporary files and folders of interrupted writes, only the topmost of each."""
    for name, pattern in _TEMPORARY_IN.items():
        place = root / name
        if _is_folder(place) or not name:
            found = (path for path in place.iterdir() if pattern.fullmatch(path.name))
            yield from sorted(path for path in found if find_foreign_owner(path) is None)
    for folder in sorted(set(folders) - skip, key=_get_parts):
        if why_not_ours(folder):
            continue
        for current, names, files in os.walk(folder):
            for name in sorted([*names, *files]):
                if _TEMPORARY.fullmatch(name):
                    yield Path(current, name)
            # os.walk descends into what is left in `names`.
            names[:] = [name for name in names if not _TEMPORARY.fullmatch(name)]


def list_old_checkpoints(
    entry: ManifestEntry, folders: Mapping[Path, str], active: set[Path]
) -> list[Path]:
    """Return all checkpoints of a finished run but the last, and the bad ones that were set aside.

    None of a run that is active, whose files are not as recorded (it will be repeated, and can
    resume from its checkpoints), that keeps them for other runs (`keep_every_epochs`), or that is
    another user's.
    """
    from mugs.checkpoint.record import list_checkpoints

    folder = entry.run_dir / "checkpoints"
    keeps = entry.run_dir in active or entry.config.get("keep_every_epochs")
    if keeps or entry.run_dir not in folders or not _is_folder(folder):
        return []
    found = [*list_checkpoints(folder)[:-1], *sorted(folder.glob("bad_step_*"))]
    if not found or why_not_ours(entry.run_dir) or manifest.find_problems(entry):
        return []
    return found


def measure_leftover(path: Path, why: str, run: str = "") -> Leftover:
    """Return a path with the size of all files in it and the time of the newest change."""
    stats = []
    for inner in [path, *path.rglob("*")] if _is_folder(path) else [path]:
        with suppress(FileNotFoundError):  # removed meanwhile
            stats.append(inner.lstat())
    size = sum(found.st_size for found in stats if not stat.S_ISDIR(found.st_mode))
    # What vanished altogether counts as changed now, so it is left alone.
    changed = max((found.st_mtime for found in stats), default=time.time())
    return Leftover(path, why, size, changed, run)


def is_idle(leftover: Leftover, now: float) -> bool:
    """Return whether nothing in it changed lately; `now` is the time of the file server."""
    return now - leftover.changed > IDLE_S


def _get_parts(path: Path) -> tuple[str, ...]:
    """Return by what paths are sorted; given as key, it is asked for once for each."""
    return path.parts


def _is_folder(path: Path) -> bool:
    return path.is_dir() and not path.is_symlink()
