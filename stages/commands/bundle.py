"""The command `bundle`: a reproduction as one file that a stranger can check."""

import hashlib
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from pipeline import manifest
from pipeline.archive import ArchiveError, open_archive, write_archive
from pipeline.files import OverwriteError, check_overwrite, expand_home, hash_file, read_bounded
from pipeline.manifest import ManifestEntry
from pipeline.spec import ConfigError
from results import publish
from results.collect import CollectedResults
from results.report.graph import Node
from results.report.page import render_report
from stages.commands import bundle_content as content
from stages.commands.finished_results import collect_finished, find_paper_differences
from stages.commands.reproduction import Selection
from stages.shared.frozen import WEIGHTS

# Lines of numbers; of a long pretraining some MB.
LARGEST_METRICS = 1 << 30

Contents = dict[str, bytes | Path]


@dataclass(frozen=True)
class BundleRequest:
    """The options of the command, under their own names."""

    reproduction: str
    out: Path | None = None
    weights: bool = False
    co2: float | None = None
    force: bool = False


def write_bundle(
    selection: Selection, request: BundleRequest, nodes: Sequence[Node]
) -> tuple[Path, list[str]]:
    """Write a bundle; return its path, and a line for each run that is not in it.

    `nodes` are the runs that the report draws.

    Raises:
        ConfigError: no run is done, a file of a run is not what it wrote, or the bundle is not
            called .zip.
        RowsError: a result row was refused.
        OverwriteError: there is a file that is no bundle, or one with backbones that this one has
            not, and `force` is not given.
    """
    name = Path(request.reproduction).stem
    path = expand_home(request.out or selection.root / f"{name}.bundle.zip")
    if path.suffix != ".zip":
        raise ConfigError(f"--out {path}: expected a name that ends in .zip")
    check_overwrite(path, content.MARK, force=request.force)
    if not (request.weights or request.force):
        _check_no_weights(path)
    entries = _find_entries(selection)
    missing = [run.name for run in selection.runs if run.run_id not in entries]
    collection = collect_finished(selection.root, selection.runs).require_valid()
    if not collection.results:
        raise ConfigError(
            f"{selection.root}: no run of {request.reproduction} with results is done, so there is"
            " nothing to bundle"
        )
    hidden = content.list_hidden_folders(selection.root)
    cleaned = [content.clean_entry(entry, hidden) for _, entry in sorted(entries.items())]
    collection = replace(collection, runs=content.read_finished_runs(cleaned))
    contents: Contents = {}
    for entry in cleaned:
        contents |= _collect_records(entry, hidden)
        if request.weights:
            contents |= _collect_weights(entry, cleaned)
    contents[content.REPRODUCTION] = content.format_reproduction(name, selection.runs)
    contents[content.REPORT] = _render_report(
        name, selection, collection, nodes, hidden, request.co2
    )
    contents |= _collect_results(collection)
    about = content.BundleFile(
        reproduction=name,
        runs=[content.record_folder(entry) for entry in cleaned],
        not_done=missing,
    )
    # Not sorted: the head of the file says what it is.
    contents[content.BUNDLE] = (about.model_dump_json(indent=1) + "\n").encode()
    _add_lists(name, contents, cleaned)
    write_archive(path, contents)
    return path, [f"not done, so not in the bundle: {run}" for run in missing]


def _check_no_weights(path: Path) -> None:
    """Raise OverwriteError if a bundle has backbones, which take hours to train."""
    if not path.exists():
        return
    try:
        with open_archive(path) as archive:
            kept = any(name.startswith("weights/") for name in archive.members)
    except ArchiveError:
        return  # damaged
    if kept:
        raise OverwriteError(
            f"{path}: has backbones, which the new bundle would not have; give --weights, another"
            " --out, or --force"
        )


def _find_entries(selection: Selection) -> dict[str, ManifestEntry]:
    """Return the entries of the finished runs by id."""
    found = {}
    for run in selection.runs:
        entry = manifest.find_done(selection.root, run.run_id)
        if entry is not None:
            found[run.run_id] = entry
    return found


def _collect_records(entry: ManifestEntry, hidden: Sequence[str]) -> Contents:
    """Return what is bundled of a run's folder but its weights."""
    folder = f"records/{content.record_folder(entry)}"
    attempts = content.describe_attempts(entry.run_dir, hidden)
    found: Contents = {
        f"{folder}/{content.ENTRY}": content.format_entry(entry),
        f"{folder}/{content.ATTEMPTS}": content.format_json(attempts),
    }
    if entry.rows_path is not None:
        found[f"{folder}/{content.ROWS}"] = read_bounded(entry.rows_path)
    metrics = entry.run_dir / content.METRICS
    if metrics.is_symlink() or metrics.exists():
        _check_inside(entry, metrics)
        owner = entry.run_dir.stat().st_uid
        found[f"{folder}/{content.METRICS}"] = read_bounded(metrics, LARGEST_METRICS, owner=owner)
    return found


def _check_inside(entry: ManifestEntry, path: Path) -> None:
    """Raise ConfigError if a file of a run is a link, which may lead to a private file."""
    if path.is_symlink() or manifest.find_outside(entry.run_root, path):
        raise ConfigError(f"{path}: leads out of the folder of its run, so nothing is bundled")


def _collect_weights(entry: ManifestEntry, entries: Sequence[ManifestEntry]) -> Contents:
    """Return the backbones of a run: the teacher, and what the evaluations took.

    Raises:
        ConfigError: one is not what the run wrote.
    """
    if entry.stage not in WEIGHTS.split("|"):
        return {}
    taken = {"teacher"} | {
        str(other.config.get("weights"))
        for other in entries
        if entry.run_id in other.upstream.values()
    }
    found: Contents = {}
    for label in sorted(taken & entry.outputs.keys()):
        path = entry.output(label)
        _check_inside(entry, path)
        try:
            manifest.check_intact(entry, label)
        except manifest.DamagedError as error:
            raise ConfigError(str(error)) from error
        found[f"weights/{content.record_folder(entry)}/{label}.safetensors"] = path
    return found


def _render_report(
    name: str,
    selection: Selection,
    collection: CollectedResults,
    nodes: Sequence[Node],
    hidden: Sequence[str],
    co2: float | None,
) -> bytes:
    shown = [replace(node, detail=content.hide_paths(node.detail, hidden)) for node in nodes]
    text = render_report(
        collection,
        selection.root,
        nodes=shown,
        paper_says=find_paper_differences(collection),
        co2=co2,
        # The folder's name is private, and another one would be another bundle.
        title=name,
    )
    return text.encode(errors="backslashreplace")


def _collect_results(collection: CollectedResults) -> Contents:
    """Return rows, runs, and the tables that are made of them alone."""
    with tempfile.TemporaryDirectory() as folder:
        files = publish.write_published(collection, Path(folder))
        found: Contents = {file.name: file.read_bytes() for file in files}
        published = publish.read_published(Path(folder))
    return found | content.render_tables(published)


def _add_lists(name: str, contents: Contents, entries: Sequence[ManifestEntry]) -> None:
    """Add what lists the other files: the metadata, then the checksums of all."""
    checksums = {file: _hash(found) for file, found in contents.items()}
    sizes = {file: _measure(found) for file, found in contents.items()}
    contents[content.CRATE] = content.build_crate(name, sizes, checksums, entries)
    checksums[content.CRATE] = _hash(contents[content.CRATE])
    contents[content.CHECKSUMS] = content.format_checksums(checksums)


def _hash(found: bytes | Path) -> str:
    return hash_file(found) if isinstance(found, Path) else hashlib.sha256(found).hexdigest()


def _measure(found: bytes | Path) -> int:
    return found.stat().st_size if isinstance(found, Path) else len(found)
