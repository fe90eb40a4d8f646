"""A finished run together with all that it needs, for `diagnose`."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pipeline import manifest
from pipeline.files import expand_home
from pipeline.manifest import ManifestEntry
from pipeline.reading import format_choices
from pipeline.spec import ConfigError
from results import publish
from results.schema import ResultRow
from results.store import read_results
from stages.commands.bundle_content import read_science
from stages.commands.reproduction import Selection

# The metrics that tables show, where a run has several.
MAIN_METRICS = ("top1", "box AP", "mIoU", "J&F")


@dataclass(frozen=True)
class Chain:
    """A finished run with all that it needs and that has a record, the nearest first."""

    entries: tuple[ManifestEntry, ...]

    @property
    def run(self) -> ManifestEntry:
        """The run that is asked about."""
        return self.entries[0]

    @property
    def by_id(self) -> Mapping[str, ManifestEntry]:
        """The entries by run id."""
        return {entry.run_id: entry for entry in self.entries}

    def of_stage(self, *stages: str) -> list[ManifestEntry]:
        """Return the entries of some stages."""
        return [entry for entry in self.entries if entry.stage in stages]

    def find_weights(self) -> ManifestEntry | None:
        """Return the pretraining or import whose weights the run evaluates."""
        return next(iter(self.of_stage("pretrain", "import")), None)

    def find_data(self) -> ManifestEntry | None:
        """Return the data set that the run is evaluated on."""
        for entry in self.entries:
            if "data" in entry.upstream:
                return self.by_id.get(entry.upstream["data"])
        return None

    def read_evaluation(self) -> dict[str, Any]:
        """Return the settings of the evaluation itself, whatever weights it is of.

        Raises:
            ConfigError: they were recorded by code that had others.
        """
        settings = read_science(self.run)
        for features in self.of_stage("features"):
            # What is set of the crop counts where features are computed.
            stored = read_science(features)
            settings |= {key: stored[key] for key in settings.keys() & stored.keys()}
        return {key: value for key, value in settings.items() if key not in ("weights", "seed")}


@dataclass(frozen=True)
class Reference:
    """The finished runs of --against; none without it.

    `copies` are left out of `entries`: each is a run of the chain itself, or a copy of it, and
    would agree with it whatever is wrong.
    """

    entries: tuple[ManifestEntry, ...] = ()
    copies: tuple[ManifestEntry, ...] = ()

    def of_stage(self, stage: str) -> list[ManifestEntry]:
        """Return the entries of a stage."""
        return [entry for entry in self.entries if entry.stage == stage]

    def describe_lack(self) -> str:
        """Return what to give for an answer; that it was given, and did not help, if it was."""
        if self.copies:
            return "--against does not tell without the copies of the run"
        return "--against does not tell" if self.entries else "give --against RUN_ROOT"

    def describe_copies(self) -> str:
        """Return how many runs count, and which are left out."""
        names = ", ".join(f"{entry.name}-{entry.run_id}" for entry in self.copies)
        verb = "is the run itself, or a copy of it"
        if len(self.copies) > 1:
            verb = "each is the run itself or one that it needs, or a copy of it"
        return f"{len(self.entries)}; left out: {names}: {verb}"


def load_chain(selection: Selection, name: str) -> Chain:
    """Return the selected run and all that it needs.

    Raises:
        ConfigError: there is no such run, `name` is a stage of several, or the run is not done.
    """
    named = [
        run for run in selection.runs if name in (run.name, run.run_id, f"{run.name}-{run.run_id}")
    ]
    named = named or [run for run in selection.runs if run.stage == name]
    names = [run.name for run in named]
    if not names:
        choices = format_choices(name, [run.name for run in selection.runs])
        raise ConfigError(f"{name}: no such run{choices}")
    if len(names) > 1:
        raise ConfigError(f"{name}: {len(names)} runs are meant ({', '.join(names)}); name one")
    (run,) = named
    entry = manifest.find_done(selection.root, run.run_id)
    if entry is None:
        raise ConfigError(
            f"{run.name} (run {run.run_id}) is not done in {selection.root}; give diagnose the "
            "same --set and --seeds as the run, or look at its log with logs"
        )
    return collect_chain(entry)


def collect_chain(entry: ManifestEntry) -> Chain:
    """Return a finished run and all that it needs, from the manifest of its run root."""
    found = {entry.run_id: entry}
    queue = [entry]
    while queue:
        for need in queue.pop(0).upstream.values():
            needed = None if need in found else manifest.read_entry(entry.run_root, need)
            if needed is not None:
                found[need] = needed
                queue.append(needed)
    return Chain(tuple(found.values()))


def load_reference(root: Path | None, chain: Chain) -> Reference:
    """Return the finished runs of a sound run root that are no copies of those of a chain.

    Raises:
        ConfigError: there is no such folder, it is the run root of the chain itself, or no finished
            run is in it.
    """
    if root is None:
        return Reference()
    root = expand_home(root).absolute()
    if not root.is_dir():
        raise ConfigError(f"--against {root}: there is no such folder")
    # By device and inode, so that links and other spellings of the path are seen through.
    if root.samefile(chain.run.run_root):
        raise ConfigError(
            f"--against {root}: is the run root of the run itself, which always agrees with "
            "itself; give that of other, sound runs"
        )
    if publish.is_published(root):
        raise ConfigError(
            f"--against {root}: is a published folder; diagnose needs a run root (tables --against "
            "compares the numbers with it)"
        )
    found = manifest.list_done(root)
    if not found:
        raise ConfigError(f"--against {root}: this run root has no finished runs")
    copies = tuple(
        entry
        for entry in found
        if (mine := chain.by_id.get(entry.run_id)) is not None and is_copy(entry, mine)
    )
    return Reference(tuple(entry for entry in found if entry not in copies), copies)


def is_copy(entry: ManifestEntry, other: ManifestEntry) -> bool:
    """Return whether two records of one run id are of one execution, and not of a repetition."""
    began = entry.provenance.get("started")
    if began is not None and began == other.provenance.get("started"):
        return True
    # Two executions hardly take as long to the millisecond and end in the same second.
    return bool(entry.seconds) and (entry.finished, entry.seconds) == (
        other.finished,
        other.seconds,
    )


def read_main_rows(entry: ManifestEntry) -> list[ResultRow]:
    """Return the result rows of a run, of the metric that tables show."""
    if entry.rows_path is None or not entry.rows_path.is_file():
        return []
    results, _ = read_results(entry.rows_path)
    rows = [each.row for each in results]
    metrics = [row.metric for row in rows]
    shown = next((metric for metric in (*MAIN_METRICS, *metrics) if metric in metrics), "")
    return [row for row in rows if row.metric == shown]
