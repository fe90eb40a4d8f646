"""One JSON per finished run: `<run_root>/manifest/<run_id>.json`, written last; present and valid = done."""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict, Field, PrivateAttr, ValidationError

from pipeline.atomic import write_text_atomic
from pipeline.attempts import StaleAttemptError, is_current
from pipeline.spec import StageRun

logger = logging.getLogger(__name__)
_CHUNK = 1 << 22


class Output(BaseModel):
    """A file or folder made by a run: path below the run root, size in bytes, SHA-256 of the content."""

    model_config = ConfigDict(frozen=True, extra="forbid")
    path: str
    size: int
    sha256: str


class ManifestEntry(BaseModel):
    """Record of one finished run."""

    model_config = ConfigDict(frozen=True, extra="forbid")
    stage: str
    name: str
    run_id: str
    upstream: Mapping[str, str] = Field(default_factory=dict)
    config: Mapping[str, Any] = Field(default_factory=dict)
    outputs: Mapping[str, Output] = Field(default_factory=dict)
    rows: str | None = None
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
            raise KeyError(f"run {self.name}-{self.run_id} has no output {label!r} (it has: {known})")
        return (self._run_root / self.outputs[label].path).absolute()

    def at(self, run_root: Path) -> ManifestEntry:
        """The same entry, its paths below `run_root`."""
        entry = self.model_copy()
        entry._run_root = Path(run_root)
        return entry


@dataclass(frozen=True)
class Split:
    """Runs of a plan by whether the manifest says they are done."""

    done: dict[str, ManifestEntry]
    pending: list[StageRun]


def entry_path(run_root: Path, run_id: str) -> Path:
    """Where the entry of a run is."""
    return run_root / "manifest" / f"{run_id}.json"


def run_ids(run_root: Path) -> list[str]:
    """Ids of all runs with an entry, sorted."""
    return sorted(path.stem for path in (run_root / "manifest").glob("*.json") if not path.name.startswith("."))


def content_size(path: Path) -> int:
    """Bytes in a file, or in all files of a folder; OSError when there is nothing."""
    if path.is_dir():
        return sum(p.stat().st_size for p in path.rglob("*") if p.is_file())
    return path.stat().st_size


def content_sha256(path: Path) -> str:
    """SHA-256 of a file; of a folder, that of its sorted relative names and file hashes."""
    digest = hashlib.sha256()
    if path.is_dir():
        for file in sorted(p for p in path.rglob("*") if p.is_file()):
            digest.update(f"{file.relative_to(path).as_posix()} {content_sha256(file)}\n".encode())
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
    return Output(path=relative, size=content_size(path), sha256=content_sha256(path))


def record(run_root: Path, entry: ManifestEntry) -> Path:
    """Publish an entry, atomically; StaleAttemptError when a newer attempt of the run has started."""
    run_dir = entry.at(run_root).run_dir
    if not is_current(run_dir, entry.attempt):
        raise StaleAttemptError(f"{run_dir}: attempt {entry.attempt} is not the newest, it may not publish")
    path = entry_path(run_root, entry.run_id)
    write_text_atomic(path, entry.model_dump_json(indent=1) + "\n")
    return path


def read(run_root: Path, run_id: str) -> ManifestEntry | None:
    """The entry of a run, or None; one that does not parse or is of another run is named and ignored."""
    path = entry_path(run_root, run_id)
    try:
        entry = ManifestEntry.model_validate_json(path.read_bytes())
    except FileNotFoundError:
        return None
    except (OSError, ValidationError, ValueError) as error:
        reason = str(error).splitlines()[0]
        logger.warning("%s: not a readable manifest entry, the run counts as not done (%s)", path, reason)
        return None
    if entry.run_id != run_id:
        logger.warning("%s: entry is of run %s, the run counts as not done", path, entry.run_id)
        return None
    return entry.at(run_root)


def problems(entry: ManifestEntry, *, hashes: bool = False) -> list[str]:
    """What is wrong with the files of an entry: missing, wrong size, and with `hashes` wrong content."""
    found = []
    for label, output in entry.outputs.items():
        path = entry.output(label)
        try:
            size = content_size(path)
        except OSError:
            found.append(f"{path}: output {label!r} is missing")
            continue
        if size != output.size:
            found.append(f"{path}: output {label!r} has {size} bytes, the manifest says {output.size}")
        elif hashes and content_sha256(path) != output.sha256:
            found.append(f"{path}: output {label!r} differs from the SHA-256 in the manifest")
    rows = entry.rows_path
    if rows is not None and not rows.is_file():
        found.append(f"{rows}: result rows are missing")
    return found


def find_done(run_root: Path, run_id: str) -> ManifestEntry | None:
    """The entry of a run when it is valid: it parses, the id matches, every output is there with its size."""
    entry = read(run_root, run_id)
    if entry is None:
        return None
    wrong = problems(entry)
    for problem in wrong:
        logger.warning("%s; run %s-%s counts as not done", problem, entry.name, run_id)
    return None if wrong else entry


def split(run_root: Path, runs: Iterable[StageRun]) -> Split:
    """Sort runs into done and pending."""
    done: dict[str, ManifestEntry] = {}
    pending: list[StageRun] = []
    for run in runs:
        entry = find_done(run_root, run.run_id)
        if entry is None:
            pending.append(run)
        else:
            done[run.run_id] = entry
    return Split(done, pending)
