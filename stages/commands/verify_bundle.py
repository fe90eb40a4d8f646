"""The command `verify` for a bundle: a file of somebody else, of which nothing is believed.

First the form of the file, then the checksums, then everything that follows from the rest: what
was changed together with its checksum contradicts something else. docs/evidence.md says what this
proves, and what it cannot.
"""

import csv
import hashlib
import io
import json
import tempfile
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict, TypeAdapter, ValidationError

from pipeline.archive import Archive, ArchiveError, open_archive
from pipeline.files import FormatVersionError, check_format_version, expand_home
from pipeline.identity import science_fields
from pipeline.manifest import ManifestEntry, parse_entry
from pipeline.spec import ConfigError, StageRun
from pipeline.text import format_count
from results import publish
from results.collect import CollectedResults
from results.runs import check_types
from results.store import RowsError
from stages import STAGES
from stages.commands import bundle_content as content
from stages.commands.reproduction import all_runs

# Bytes. Parsing takes some ten times as much memory; a list of 1,000 runs has 5 MB.
LARGEST_JSON = 16 << 20
# What parsing something strange may raise.
_STRANGE = (ValueError, LookupError, TypeError, AttributeError, RecursionError)


class Failed(BaseModel):
    """How an attempt failed."""

    model_config = ConfigDict(extra="forbid")
    error: str
    time: float
    step: int | None


class Attempt(BaseModel):
    """Content of `attempts.json`, for each attempt."""

    model_config = ConfigDict(extra="forbid")
    attempt: int
    time: float = 0.0
    ranks: int = 1
    gpus: int = 0
    job_id: str | None = None
    failed: Failed | None = None
    interrupted: str | None = None
    joules: list[float] = []


@dataclass
class BundleCheck:
    """What was found in a bundle; a line for each problem."""

    path: Path
    problems: list[str] = field(default_factory=list)
    about: content.BundleFile | None = None
    files: int = 0
    tables: int = 0
    sha256: dict[str, str] = field(default_factory=dict)
    entries: dict[str, ManifestEntry] = field(default_factory=dict)
    runs: Sequence[StageRun] = ()
    results: CollectedResults | None = None

    @property
    def intact(self) -> bool:
        """Whether nothing is wrong."""
        return not self.problems

    @property
    def weights(self) -> list[str]:
        """Names of the backbones."""
        return sorted(name for name in self.sha256 if name.startswith("weights/"))

    def summary(self) -> str:
        """Return one line about the check."""
        if self.problems:
            count = format_count(len(self.problems), "problem")
            return f"{count}; get the bundle again from whoever made it"
        return (
            f"{self.files} files as listed, {self.tables} tables made again from the rows,"
            f" {format_count(len(self.entries), 'run')},"
            f" {format_count(len(self.weights), 'backbone')}, no problems"
        )


def is_bundle(text: str) -> bool:
    """Return whether an argument names a bundle, and not a reproduction."""
    if text.endswith(".zip"):
        return True
    path = expand_home(text)
    if not path.is_file():
        return False
    # A bundle that was given another name.
    with open(path, "rb") as stream:
        return stream.read(4) == b"PK\3\4"


class _Contradiction(ValueError):
    """A part of a bundle does not fit to another one."""


def verify_bundle(path: Path) -> BundleCheck:
    """Check a bundle: its form, its checksums, and that its parts agree.

    Raises:
        ConfigError: there is no such file.
        OSError: the file cannot be read.
    """
    if not path.exists():
        raise ConfigError(f"{path}: there is no such file")
    found = BundleCheck(path)
    try:
        with open_archive(path) as archive:
            _check_archive(archive, found)
    except ArchiveError as error:
        found.problems.append(str(error))
    return found


def _check_archive(archive: Archive, found: BundleCheck) -> None:
    found.files = len(archive.members)
    found.problems += _find_strange_names(archive)
    if found.intact:
        found.problems += _check_hashes(archive, found)
    checks = (_check_about, _check_entries, _check_rows, _check_plan, _check_weights, _check_crate)
    for check in checks:
        # Each takes for granted what the one before it has checked.
        if not found.intact:
            return
        try:
            found.problems += [f"{archive.path}: {line}" for line in check(archive, found)]
        except (_Contradiction, FormatVersionError, ConfigError, RowsError) as error:
            found.problems += [f"{archive.path}: {line}" for line in str(error).splitlines()]


def _find_strange_names(archive: Archive) -> Iterator[str]:
    for name in content.SINGLE_FILES:
        if name not in archive.members:
            yield f"{archive.path}: {name} is missing"
    for name in archive.members:
        parts = name.split("/")
        known = (
            name in content.SINGLE_FILES
            or (len(parts) == 2 and parts[0] == "tables")
            or (len(parts) == 4 and parts[0] == "records" and parts[3] in content.RECORD_FILES)
            or (len(parts) == 4 and parts[0] == "weights" and parts[3].endswith(".safetensors"))
        )
        if not known:
            yield f"{archive.path}: {name} is no file of a bundle"


def _check_hashes(archive: Archive, found: BundleCheck) -> Iterator[str]:
    """Compare each file with its SHA-256, and the list with the files."""
    text = archive.read(content.CHECKSUMS, LARGEST_JSON).decode("utf-8", errors="replace")
    listed: dict[str, str] = {}
    for line in text.splitlines():
        digest, _, name = line.partition("  ")
        listed[name] = digest
    names = archive.members.keys() - {content.CHECKSUMS}
    for name in sorted(names - listed.keys()):
        yield f"{archive.path}: {name} is not in {content.CHECKSUMS}"
    for name in sorted(listed.keys() - names):
        yield f"{archive.path}: {name!r} is in {content.CHECKSUMS}, but missing"
    for name in sorted(names & listed.keys()):
        sha256 = hashlib.sha256()
        for chunk in archive.iter_chunks(name):
            sha256.update(chunk)
        found.sha256[name] = sha256.hexdigest()
        if found.sha256[name] != listed[name]:
            yield f"{archive.path}: {name} differs from its SHA-256"
    if text.encode() != content.format_checksums(listed):
        yield f"{archive.path}: {content.CHECKSUMS} is not as bundle writes it"


def _read_json(archive: Archive, name: str) -> Any:
    """Return the content of a JSON file.

    Raises:
        _Contradiction: it is none.
    """
    try:
        return json.loads(archive.read(name, LARGEST_JSON))
    except ArchiveError:
        raise
    except _STRANGE as error:
        raise _Contradiction(f"{name} is not JSON: {_first_line(error)}") from None


def _validate(kind: Any, value: Any, name: str) -> Any:
    """Return a value as one of a type.

    Raises:
        _Contradiction: it has other keys, or values of other types.
    """
    try:
        return TypeAdapter(kind).validate_python(value)
    except ValidationError as error:
        raise _Contradiction(f"{name}: {_first_line(error)}") from None


def _first_line(error: Exception) -> str:
    if isinstance(error, ValidationError):
        first = error.errors(include_url=False)[0]
        return f"{'.'.join(map(str, first['loc']))}: {first['msg']}"
    return next(iter(str(error).splitlines()), type(error).__name__)


def _check_about(archive: Archive, found: BundleCheck) -> Iterator[str]:
    """Read what the bundle says of itself."""
    value = _read_json(archive, content.BUNDLE)
    if isinstance(value, dict):
        version = value.get("format_version")
        check_format_version(content.BUNDLE, version, newest=content.FORMAT_VERSION)
    about: content.BundleFile = _validate(content.BundleFile, value, content.BUNDLE)
    found.about = about
    there = {"/".join(name.split("/")[1:3]) for name in archive.members if "records/" in name}
    for folder in sorted(there ^ set(about.runs)):
        yield f"records/{folder} and {content.BUNDLE} do not agree about this run"


def _check_entries(archive: Archive, found: BundleCheck) -> Iterator[str]:
    """Read the record of each run."""
    assert found.about is not None
    for folder in found.about.runs:
        name = f"records/{folder}/{content.ENTRY}"
        try:
            entry = parse_entry(archive.read(name, LARGEST_JSON), name)
        except (ArchiveError, FormatVersionError):
            raise
        except _STRANGE as error:
            yield f"{name} is no record of a run: {_first_line(error)}"
            continue
        if content.record_folder(entry) != folder or entry.stage not in STAGES:
            yield f"{name}: is of another run than its folder"
            continue
        if entry.run_id in found.entries:
            yield f"{name}: there are two records of run {entry.run_id}"
        found.entries[entry.run_id] = entry
        attempts = f"records/{folder}/{content.ATTEMPTS}"
        _validate(list[Attempt], _read_json(archive, attempts), attempts)
        yield from _compare_rows_file(found, entry, folder)
    try:
        for run in content.read_finished_runs(found.entries.values()).values():
            check_types(run)
    except _STRANGE as error:
        yield f"records: {_first_line(error)}"


def _compare_rows_file(found: BundleCheck, entry: ManifestEntry, folder: str) -> Iterator[str]:
    rows = f"records/{folder}/{content.ROWS}"
    if (entry.rows is not None) != (rows in found.sha256):
        yield f"{rows} and {content.ENTRY} beside it do not agree whether there are rows"
    elif entry.rows is not None and entry.rows_sha256 != found.sha256[rows]:
        yield f"{rows}: is not what its run wrote"


def _check_rows(archive: Archive, found: BundleCheck) -> Iterator[str]:
    """Compare rows and runs with the records, and make the tables again."""
    rows = archive.read(content.ROWS, LARGEST_JSON)
    recorded: Counter[tuple[str, ...]] = Counter()
    for name in archive.members:
        if name.startswith("records/") and name.endswith(f"/{content.ROWS}"):
            recorded += _count_rows(archive.read(name, LARGEST_JSON), name)
    if _count_rows(rows, content.ROWS) != recorded:
        yield f"{content.ROWS} has other rows than the records of the runs"
        return
    runs = content.read_finished_runs(found.entries.values())
    published = _read_json(archive, content.RUNS)
    described = json.loads(json.dumps(publish.describe_runs(runs)))
    if not isinstance(published, dict) or published.get("runs") != described:
        yield f"{content.RUNS} says something else of the runs than their records"
        return
    # In a folder of our own: these two are read as those of `tables --against` are.
    with tempfile.TemporaryDirectory() as folder:
        Path(folder, content.ROWS).write_bytes(rows)
        Path(folder, content.RUNS).write_bytes(archive.read(content.RUNS, LARGEST_JSON))
        try:
            found.results = publish.read_published(Path(folder))
        except RowsError as error:
            raise _Contradiction(str(error).replace(f"{folder}/", "")) from None
    tables = content.render_tables(found.results)
    found.tables = len(tables)
    bundled = {name for name in archive.members if name.startswith("tables/")}
    for name in sorted(bundled ^ tables.keys()):
        yield f"{name}: {'no such table' if name in bundled else 'is missing'}"
    for name in sorted(bundled & tables.keys()):
        if found.sha256[name] != hashlib.sha256(tables[name]).hexdigest():
            yield f"{name} differs from the table that the rows give"


def _count_rows(data: bytes, name: str) -> Counter[tuple[str, ...]]:
    try:
        lines = list(csv.reader(io.StringIO(data.decode(), newline=""), strict=True))
    except (csv.Error, UnicodeDecodeError) as error:
        raise _Contradiction(f"{name}: cannot be read: {error}") from None
    return Counter(tuple(line) for line in lines[1:])


def _check_plan(archive: Archive, found: BundleCheck) -> Iterator[str]:
    """Plan the reproduction: its settings give the ids of the runs."""
    assert found.about is not None
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, content.REPRODUCTION)
        path.write_bytes(archive.read(content.REPRODUCTION, LARGEST_JSON))
        try:
            found.runs = all_runs(str(path))
        except ConfigError as error:
            raise _Contradiction(str(error).replace(f"{folder}/", "")) from None
    planned = {run.run_id: run for run in found.runs}
    for run_id, entry in found.entries.items():
        folder = content.record_folder(entry)
        run = planned.get(run_id)
        if run is None:
            yield f"records/{folder}: {content.REPRODUCTION} has no run of this id"
        elif run.stage != entry.stage or dict(run.needs) != dict(entry.upstream):
            yield f"records/{folder}: {content.REPRODUCTION} says that it is another run"
        elif content.read_science(entry) != science_fields(run.config):
            yield f"records/{folder}: {content.REPRODUCTION} has other settings of this run"
    missing = [run.name for run in found.runs if run.run_id not in found.entries]
    if missing != found.about.not_done:
        yield f"{content.BUNDLE} and {content.REPRODUCTION} do not agree which runs are not done"


def _check_weights(archive: Archive, found: BundleCheck) -> Iterator[str]:
    """Compare each backbone with what the record of its run says."""
    outputs = {
        f"weights/{content.record_folder(entry)}/{label}.safetensors": output
        for entry in found.entries.values()
        for label, output in entry.outputs.items()
    }
    for name in found.weights:
        if name not in outputs:
            yield f"{name}: no run has written it"
        elif outputs[name].sha256 != found.sha256[name]:
            yield f"{name}: is not what its run wrote"


def _check_crate(archive: Archive, found: BundleCheck) -> Iterator[str]:
    """Compare the metadata for other programs with the files."""
    assert found.about is not None
    listed: Mapping[str, str] = {
        name: digest for name, digest in found.sha256.items() if name != content.CRATE
    }
    sizes = {name: archive.members[name].size for name in listed}
    entries = [entry for _, entry in sorted(found.entries.items())]
    expected = content.build_crate(found.about.reproduction, sizes, listed, entries)
    if hashlib.sha256(expected).hexdigest() != found.sha256[content.CRATE]:
        yield f"{content.CRATE} does not describe this bundle"
