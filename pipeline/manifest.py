"""The manifest: one JSON file per finished run, `<run_root>/manifest/<run_id>.json`.

It is written last, so a run whose entry is present and valid is done. An entry contains its own
checksum and those of all files it names; none of these files may lie outside the run root.
"""

import errno
import hashlib
import json
import logging
import os
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Annotated, Any, Self

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, PrivateAttr, ValidationError

from pipeline.attempts import check_newest
from pipeline.files import (
    FormatVersionError,
    check_format_version,
    hash_file,
    hash_named_files,
    note_unreadable,
    read_bounded,
    verify_checksum,
    with_checksum,
    write_json_atomic,
)
from pipeline.spec import ConfigError, PlainName, StageRun

logger = logging.getLogger(__name__)
FORMAT_VERSION = 1
"""Version of entries. Those without the field are of version 1."""

_RUN_ID = r"\w[\w.-]*"


def _below_run_root(path: str) -> str:
    parts = PurePosixPath(path).parts
    if not parts or path.startswith("/") or ".." in parts or "\0" in path:
        raise ValueError(f"{path!r} does not lie below the run root")
    return path


RelativePath = Annotated[str, AfterValidator(_below_run_root)]
# Bounded, so that whatever is computed of them stays finite and printable.
Count = Annotated[int, Field(ge=0, lt=1 << 63)]
Amount = Annotated[float, Field(ge=0, lt=1e12)]


class DamagedError(ValueError):
    """A file is not what a run made; the message names it."""


class Output(BaseModel):
    """A file or folder made by a run: path below the run root, bytes, SHA-256 of the content."""

    model_config = ConfigDict(frozen=True, extra="forbid")
    path: RelativePath
    size: Count
    sha256: str


class ManifestEntry(BaseModel):
    """Record of one finished run."""

    model_config = ConfigDict(frozen=True, extra="forbid")
    format_version: int = FORMAT_VERSION
    stage: PlainName
    name: PlainName
    run_id: PlainName
    upstream: Mapping[str, str] = Field(default_factory=dict)
    config: Mapping[str, Any] = Field(default_factory=dict)
    outputs: Mapping[str, Output] = Field(default_factory=dict)
    rows: RelativePath | None = None
    rows_sha256: str | None = None
    info: Mapping[str, Any] = Field(default_factory=dict)
    provenance: Mapping[str, Any] = Field(default_factory=dict)
    attempt: Count = 1
    restarts: Count = 0
    device: str = "cpu"
    ranks: Count = 1
    gpus: Count = 0
    seconds: Amount = 0.0
    gpu_hours: Amount = 0.0
    finished: str = ""
    _run_root: Path = PrivateAttr(default=Path("."))
    _find_copy: Callable[[str], Path | None] | None = PrivateAttr(default=None)

    @property
    def run_root(self) -> Path:
        """The run root the entry was read from. Paths are relative to it, so it may be moved."""
        return self._run_root

    @property
    def run_dir(self) -> Path:
        """The run's folder."""
        return self._run_root / self.stage / f"{self.name}-{self.run_id}"

    @property
    def rows_path(self) -> Path | None:
        """The CSV file with the run's result rows, if it has any."""
        return self._run_root / self.rows if self.rows else None

    def output(self, label: str) -> Path:
        """Return the absolute path of an output, or of its copy (`redirect`).

        Raises:
            KeyError: there is no such output; names those that there are.
        """
        if label not in self.outputs:
            known = ", ".join(sorted(self.outputs)) or "none"
            raise KeyError(
                f"run {self.name}-{self.run_id} has no output {label!r} (it has: {known})"
            )
        if self._find_copy is not None and (copy := self._find_copy(label)) is not None:
            return copy
        return (self._run_root / self.outputs[label].path).absolute()

    def redirect(self, find_copy: Callable[[str], Path | None]) -> Self:
        """Return the same entry, whose `output` asks for a copy first; None says there is none."""
        entry = self.model_copy()
        entry._find_copy = find_copy
        return entry

    def at(self, run_root: Path) -> Self:
        """Return the same entry with its paths below `run_root`."""
        entry = self.model_copy()
        entry._run_root = Path(run_root)
        return entry


@dataclass(frozen=True)
class SplitRuns:
    """Runs of a plan by whether the manifest says they are done."""

    done: dict[str, ManifestEntry]
    pending: list[StageRun]


def entry_path(run_root: Path, run_id: str) -> Path:
    """Return where the entry of a run is.

    Raises:
        ValueError: this is no run id, but perhaps a path that leads elsewhere.
    """
    if not re.fullmatch(_RUN_ID, run_id):
        raise ValueError(f"{run_id!r} is not a run id")
    return run_root / "manifest" / f"{run_id}.json"


def list_run_ids(run_root: Path) -> list[str]:
    """Return the ids of all runs with an entry, sorted; name files that are called otherwise."""
    try:
        names = os.listdir(run_root / "manifest")
    except (FileNotFoundError, NotADirectoryError):
        return []
    found = []
    for name in sorted(names):
        run_id, suffix = os.path.splitext(name)
        # Temporary files of `write_atomic` begin with a dot.
        if suffix != ".json" or name.startswith("."):
            continue
        if re.fullmatch(_RUN_ID, run_id):
            found.append(run_id)
        else:
            path = run_root / "manifest" / name
            logger.warning("%s: not the name of a manifest entry, left out", path)
            note_unreadable(path)
    return sorted(found)


def measure_size(path: Path) -> int:
    """Return the bytes in a file, or in all files of a folder.

    Raises:
        OSError: there is nothing.
    """
    if path.is_dir():
        return sum(file.stat().st_size for file in path.rglob("*") if file.is_file())
    return path.stat().st_size


def hash_path(path: Path) -> str:
    """Return the SHA-256 of a file; of a folder, that of its sorted relative names and hashes."""
    if not path.is_dir():
        return hash_file(path)
    files = sorted(file for file in path.rglob("*") if file.is_file())
    return hash_named_files(path, (file.relative_to(path) for file in files))


def describe_output(run_root: Path, path: Path, sha256: str | None = None) -> Output:
    """Measure an output, and hash it if its SHA-256 is not given.

    Raises:
        ValueError: it lies outside the run root, or does not exist.
    """
    target = path.resolve()
    if not target.is_relative_to(run_root.resolve()):
        raise ValueError(f"output {path} is outside the run root {run_root}")
    if not path.exists():
        raise ValueError(f"output {path} does not exist")
    return Output(
        # Relative, so that the whole run root may be moved or copied.
        path=target.relative_to(run_root.resolve()).as_posix(),
        size=measure_size(path),
        sha256=sha256 or hash_path(path),
    )


def record_entry(run_root: Path, entry: ManifestEntry) -> Path:
    """Publish an entry, atomically.

    Raises:
        StaleAttemptError: a newer attempt of the run has started.
    """
    # Right before the rename: an attempt that was superseded during the run stops here.
    placed = entry.at(run_root)
    check_newest(placed.run_dir, entry.attempt)
    if placed.rows_path is not None:
        entry = entry.model_copy(update={"rows_sha256": hash_path(placed.rows_path)})
    path = entry_path(run_root, entry.run_id)
    write_json_atomic(path, with_checksum(entry.model_dump(mode="json")))
    return path


def parse_entry(content: bytes, where: str = "entry") -> ManifestEntry:
    """Return the entry in the content of the file `where`.

    Raises:
        FormatVersionError: it is of a version that this code does not read.
        ValueError: it is no entry, or not what was written.
        RecursionError: it is nested too deeply.
    """
    record = verify_checksum(json.loads(content))
    # First, since a newer entry may have fields that are unknown here.
    check_format_version(where, record.get("format_version", 1), newest=FORMAT_VERSION)
    return ManifestEntry.model_validate(record)


def read_entry(run_root: Path, run_id: str) -> ManifestEntry | None:
    """Return the entry of a run, or None; log and ignore a file that is no entry of this run.

    Raises:
        FormatVersionError: it is of a version that this code does not read. The run may be done.
    """
    path = entry_path(run_root, run_id)
    try:
        entry = parse_entry(read_bounded(path), str(path))
    except FileNotFoundError:
        if path.is_symlink():
            note_unreadable(path)
        return None  # the normal case: the run is not done
    except FormatVersionError:
        raise
    except (OSError, ValueError, RecursionError) as error:
        logger.warning(
            "%s: not a readable manifest entry, the run counts as not done (%s)",
            path,
            _first_reason(error),
        )
        note_unreadable(path)
        return None
    if entry.run_id != run_id:
        note_unreadable(path)
        logger.warning("%s: entry is of run %s, the run counts as not done", path, entry.run_id)
        return None
    return entry.at(run_root)


def _first_reason(error: Exception) -> str:
    if not isinstance(error, ValidationError):
        return str(error).splitlines()[0]
    first = error.errors(include_url=False)[0]
    return f"{'.'.join(map(str, first['loc']))}: {first['msg']}"


def find_problems(entry: ManifestEntry, *, hashes: bool = False, rows: bool = True) -> list[str]:
    """Return what is wrong with the files of an entry: missing, outside the run root, wrong size.

    With `hashes` also outputs with wrong content, which takes minutes for large ones. Rows are
    small, so their content is always checked, unless `rows` is false: then whoever reads them does.
    """
    problems = []
    for label, output in entry.outputs.items():
        # One problem per output is enough: each tells that the run must be repeated.
        path = entry.output(label)
        try:
            # Before anything is measured: a link could lead to a file that nobody wants to be read.
            outside = find_outside(entry.run_root, path)
            size = 0 if outside else measure_size(path)
        except OSError as error:
            missing = isinstance(error, FileNotFoundError)
            what = "is missing" if missing else f"cannot be read: {error}"
            problems.append(f"{path}: output {label!r} {what}")
            continue
        if outside:
            problems.append(
                f"{outside}: leads out of the run root {entry.run_root}, "
                f"output {label!r} is not read"
            )
            continue
        if size != output.size:
            problems.append(
                f"{path}: output {label!r} has {size} bytes, the manifest says {output.size}"
            )
        elif hashes and hash_path(path) != output.sha256:
            problems.append(f"{path}: output {label!r} differs from the SHA-256 in the manifest")
    return problems + _find_rows_problems(entry, content=rows)


def check_intact(entry: ManifestEntry, label: str) -> None:
    """Raise DamagedError unless an output has the content it was made with."""
    path = entry.output(label)
    if hash_path(path) != entry.outputs[label].sha256:
        raise DamagedError(
            f"{path}: output {label!r} differs from the SHA-256 in the manifest; "
            f"run {entry.name} again"
        )


def _find_rows_problems(entry: ManifestEntry, *, content: bool) -> list[str]:
    rows = entry.rows_path
    if rows is None:
        return []
    try:
        if find_outside(entry.run_root, rows):
            return [
                f"{rows}: leads out of the run root {entry.run_root}, the result rows are not read"
            ]
        if not rows.is_file():
            return [f"{rows}: result rows are missing"]
        found = hashlib.sha256(read_bounded(rows)).hexdigest() if content else entry.rows_sha256
    except OSError as error:
        return [f"{rows}: result rows cannot be read: {error.strerror}"]
    if found != entry.rows_sha256:
        return [f"{rows}: result rows differ from the SHA-256 in the manifest"]
    return []


def find_outside(run_root: Path, path: Path) -> Path | None:
    """Return the path, or the first below it, that a symbolic link leads out of the run root."""
    root = os.path.realpath(run_root)
    paths = [path, *path.rglob("*")] if path.is_dir() else [path]
    return next((each for each in paths if not _resolves_below(each, root)), None)


def _resolves_below(path: Path, root: str) -> bool:
    # As text, not as Path: this is asked of each file of thousands of runs.
    real = os.path.realpath(path)
    try:
        os.stat(real)
    except OSError as error:
        if error.errno == errno.ELOOP:  # links that lead to each other are left as they are
            return False
    return os.path.commonpath((real, root)) == root


def find_done(run_root: Path, run_id: str, *, rows: bool = True) -> ManifestEntry | None:
    """Return the entry of a run that is done, else None.

    A run is done if its entry parses, the id matches, every output is there with its size, and the
    rows are those that were written. `rows` is that of `find_problems`.
    """
    entry = read_entry(run_root, run_id)
    if entry is None:
        return None
    problems = find_problems(entry, rows=rows)
    for problem in problems:
        logger.warning("%s; run %s-%s counts as not done", problem, entry.name, run_id)
    return None if problems else entry


def check_inputs(run_root: Path, runs: Sequence[StageRun], remedy: str) -> None:
    """Raise ConfigError if a run needs one that is neither done nor among `runs`."""
    given = {run.run_id for run in runs}
    for run in runs:
        for role, need in run.needs.items():
            if need not in given and find_done(run_root, need) is None:
                raise ConfigError(
                    f"{run.name}: its input {role!r} (run {need}) is not done; {remedy}"
                )


def find_all_done(run_root: Path, run_ids: Iterable[str]) -> dict[str, ManifestEntry]:
    """Return the entries of those of many runs that are done, by run id."""
    # One listing, since most of thousands of runs may have no entry.
    recorded = set(list_run_ids(run_root))
    return {
        run_id: entry
        for run_id in run_ids
        if run_id in recorded and (entry := find_done(run_root, run_id))
    }


def list_done(run_root: Path) -> list[ManifestEntry]:
    """Return the entries of all runs of a run root that are done, in the order of their ids."""
    done = (find_done(run_root, run_id) for run_id in list_run_ids(run_root))
    return [entry for entry in done if entry is not None]


def split_runs(run_root: Path, runs: Sequence[StageRun]) -> SplitRuns:
    """Sort runs into done and pending."""
    done = find_all_done(run_root, [run.run_id for run in runs])
    return SplitRuns(done, [run for run in runs if run.run_id not in done])
