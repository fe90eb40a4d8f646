"""One JSON per finished run: `<run_root>/manifest/<run_id>.json`, written last; present and valid = done.

An entry holds its own checksum and those of all files it names; none of these may lie outside the run root.
"""

from __future__ import annotations

import hashlib
import json
import logging
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Annotated, Any

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, PrivateAttr, ValidationError

from pipeline.attempts import StaleAttemptError, is_newest_attempt
from pipeline.checksum import verify_checksum, with_checksum
from pipeline.files import write_atomic
from pipeline.spec import StageRun

logger = logging.getLogger(__name__)
_CHUNK = 1 << 22
_LIMIT = 64 << 20


def _below_run_root(path: str) -> str:
    parts = PurePosixPath(path).parts
    if not parts or path.startswith("/") or ".." in parts:
        raise ValueError(f"{path!r} does not lie below the run root")
    return path


RelativePath = Annotated[str, AfterValidator(_below_run_root)]
PlainName = Annotated[str, Field(pattern=r"^\w[\w.-]*$")]


class DamagedError(ValueError):
    """A file is not what a run made; the message names it."""


class Output(BaseModel):
    """A file or folder made by a run: path below the run root, size in bytes, SHA-256 of the content."""

    model_config = ConfigDict(frozen=True, extra="forbid")
    path: RelativePath
    size: int
    sha256: str


class ManifestEntry(BaseModel):
    """Record of one finished run."""

    model_config = ConfigDict(frozen=True, extra="forbid")
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
    attempt: int = 1
    restarts: int = 0
    device: str = "cpu"
    ranks: int = 1
    gpus: int = 0
    seconds: float = 0.0
    gpu_hours: float = 0.0
    finished: str = ""
    _run_root: Path = PrivateAttr(default=Path("."))

    @property
    def run_root(self) -> Path:
        """Run root the entry was read from; outputs are found below it, so a run root may be moved."""
        return self._run_root

    @property
    def run_dir(self) -> Path:
        """Folder of the run."""
        return self._run_root / self.stage / f"{self.name}-{self.run_id}"

    @property
    def rows_path(self) -> Path | None:
        """CSV file with the run's result rows, if it has any."""
        return self._run_root / self.rows if self.rows else None

    def output(self, label: str) -> Path:
        """Absolute path of an output; KeyError naming the labels there are."""
        if label not in self.outputs:
            known = ", ".join(sorted(self.outputs)) or "none"
            raise KeyError(
                f"run {self.name}-{self.run_id} has no output {label!r} (it has: {known})"
            )
        return (self._run_root / self.outputs[label].path).absolute()

    def at(self, run_root: Path) -> ManifestEntry:
        """The same entry, its paths below `run_root`."""
        entry = self.model_copy()
        entry._run_root = Path(run_root)
        return entry


@dataclass(frozen=True)
class SplitRuns:
    """Runs of a plan by whether the manifest says they are done."""

    done: dict[str, ManifestEntry]
    pending: list[StageRun]


def entry_path(run_root: Path, run_id: str) -> Path:
    """Where the entry of a run is; ValueError for what is no run id."""
    if not re.fullmatch(r"\w[\w.-]*", run_id):
        raise ValueError(f"{run_id!r} is not a run id")
    return run_root / "manifest" / f"{run_id}.json"


def list_run_ids(run_root: Path) -> list[str]:
    """Ids of all runs with an entry, sorted."""
    return sorted(
        path.stem
        for path in (run_root / "manifest").glob("*.json")
        if not path.name.startswith(".")
    )


def measure_size(path: Path) -> int:
    """Bytes in a file, or in all files of a folder; OSError when there is nothing."""
    if path.is_dir():
        return sum(p.stat().st_size for p in path.rglob("*") if p.is_file())
    return path.stat().st_size


def hash_path(path: Path) -> str:
    """SHA-256 of a file; of a folder, that of its sorted relative names and file hashes."""
    digest = hashlib.sha256()
    if path.is_dir():
        for file in sorted(p for p in path.rglob("*") if p.is_file()):
            digest.update(f"{file.relative_to(path).as_posix()} {hash_path(file)}\n".encode())
        return digest.hexdigest()
    with path.open("rb") as stream:
        while chunk := stream.read(_CHUNK):
            digest.update(chunk)
    return digest.hexdigest()


def describe_output(run_root: Path, path: Path) -> Output:
    """Measure and hash an output; ValueError when it lies outside the run root or does not exist."""
    if not path.resolve().is_relative_to(run_root.resolve()):
        raise ValueError(f"output {path} is outside the run root {run_root}")
    if not path.exists():
        raise ValueError(f"output {path} does not exist")
    relative = path.resolve().relative_to(run_root.resolve()).as_posix()
    return Output(path=relative, size=measure_size(path), sha256=hash_path(path))


def record_entry(run_root: Path, entry: ManifestEntry) -> Path:
    """Publish an entry, atomically; StaleAttemptError when a newer attempt of the run has started."""
    run_dir = entry.at(run_root).run_dir
    if not is_newest_attempt(run_dir, entry.attempt):
        raise StaleAttemptError(
            f"{run_dir}: attempt {entry.attempt} is not the newest, it may not publish"
        )
    rows = entry.at(run_root).rows_path
    if rows is not None:
        entry = entry.model_copy(update={"rows_sha256": hash_path(rows)})
    path = entry_path(run_root, entry.run_id)
    write_atomic(path, json.dumps(with_checksum(entry.model_dump(mode="json")), indent=1) + "\n")
    return path


def parse_entry(content: bytes) -> ManifestEntry:
    """The entry in a file. Raises ValueError, RecursionError when it is none, or not what was written."""
    return ManifestEntry.model_validate(verify_checksum(json.loads(content)))


def read_entry(run_root: Path, run_id: str) -> ManifestEntry | None:
    """The entry of a run, or None; one that does not parse or is of another run is named and ignored."""
    path = entry_path(run_root, run_id)
    try:
        if (size := path.stat().st_size) > _LIMIT:
            raise ValueError(f"{size} bytes, at most {_LIMIT} are read")
        entry = parse_entry(path.read_bytes())
    except FileNotFoundError:
        return None
    except (OSError, ValueError, RecursionError) as error:
        reason = _reason(error)
        logger.warning(
            "%s: not a readable manifest entry, the run counts as not done (%s)", path, reason
        )
        return None
    if entry.run_id != run_id:
        logger.warning("%s: entry is of run %s, the run counts as not done", path, entry.run_id)
        return None
    return entry.at(run_root)


def _reason(error: Exception) -> str:
    if not isinstance(error, ValidationError):
        return str(error).splitlines()[0]
    first = error.errors(include_url=False)[0]
    return f"{'.'.join(map(str, first['loc']))}: {first['msg']}"


def find_problems(entry: ManifestEntry, *, hashes: bool = False, rows: bool = True) -> list[str]:
    """What is wrong with the files of an entry: missing, outside, wrong size, and with `hashes` wrong content.

    Rows are few, so their content is checked too, unless `rows` is false: whoever reads them then does it.
    """
    found = []
    for label, output in entry.outputs.items():
        path = entry.output(label)
        if outside := find_outside(entry.run_root, path):
            found.append(
                f"{outside}: leads out of the run root {entry.run_root}, output {label!r} is not read"
            )
            continue
        try:
            size = measure_size(path)
        except OSError:
            found.append(f"{path}: output {label!r} is missing")
            continue
        if size != output.size:
            found.append(
                f"{path}: output {label!r} has {size} bytes, the manifest says {output.size}"
            )
        elif hashes and hash_path(path) != output.sha256:
            found.append(f"{path}: output {label!r} differs from the SHA-256 in the manifest")
    return found + _rows_problems(entry, content=rows)


def check_intact(entry: ManifestEntry, label: str) -> None:
    """Raise DamagedError unless an output has the content it was made with."""
    path = entry.output(label)
    if hash_path(path) != entry.outputs[label].sha256:
        raise DamagedError(
            f"{path}: output {label!r} differs from the SHA-256 in the manifest; run {entry.name} again"
        )


def _rows_problems(entry: ManifestEntry, *, content: bool) -> list[str]:
    rows = entry.rows_path
    if rows is None:
        return []
    if find_outside(entry.run_root, rows):
        return [f"{rows}: leads out of the run root {entry.run_root}, the result rows are not read"]
    if not rows.is_file():
        return [f"{rows}: result rows are missing"]
    if content and hash_path(rows) != entry.rows_sha256:
        return [f"{rows}: result rows differ from the SHA-256 in the manifest"]
    return []


def find_outside(run_root: Path, path: Path) -> Path | None:
    """The path, or the first below it, that a symbolic link leads out of the run root."""
    root = run_root.resolve()
    every = [path, *path.rglob("*")] if path.is_dir() else [path]
    return next((p for p in every if not p.resolve().is_relative_to(root)), None)


def find_done(run_root: Path, run_id: str, *, rows: bool = True) -> ManifestEntry | None:
    """The entry of a run when it is valid: it parses, the id matches, every output is there with its size.

    And the rows are those that were written; with `rows` false whoever reads them finds out.
    """
    entry = read_entry(run_root, run_id)
    if entry is None:
        return None
    wrong = find_problems(entry, rows=rows)
    for problem in wrong:
        logger.warning("%s; run %s-%s counts as not done", problem, entry.name, run_id)
    return None if wrong else entry


def split_runs(run_root: Path, runs: Iterable[StageRun]) -> SplitRuns:
    """Sort runs into done and pending."""
    done: dict[str, ManifestEntry] = {}
    pending: list[StageRun] = []
    for run in runs:
        entry = find_done(run_root, run.run_id)
        if entry is None:
            pending.append(run)
        else:
            done[run.run_id] = entry
    return SplitRuns(done, pending)
