"""Manifest entries of finished runs. `tables.py` and `cells.py` make the cells, not this module.

Tables, report and `--explain` see finished runs in this form.
"""

from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeVar

Item = TypeVar("Item")
Key = TypeVar("Key")

# Fields of a manifest entry that are taken over as they are.
_COPIED_FIELDS = (
    "run_id",
    "stage",
    "name",
    "upstream",
    "config",
    "info",
    "rows",
    "rows_sha256",
    "device",
    "ranks",
    "gpus",
    "seconds",
    "gpu_hours",
    "restarts",
    "finished",
)


@dataclass(frozen=True)
class FinishedRun:
    """A finished run; all paths are below the run root."""

    run_id: str
    stage: str
    name: str
    # Run ids of the inputs, by role.
    upstream: Mapping[str, str] = field(default_factory=dict)
    # Every setting, and the dotted names of those that cannot change a result.
    config: Mapping[str, Any] = field(default_factory=dict)
    runtime: frozenset[str] = frozenset()
    # Facts that a stage leaves for others: data set, weights, captions of pictures.
    info: Mapping[str, Any] = field(default_factory=dict)
    # Paths of the outputs by label, and of the result rows with their hash.
    outputs: Mapping[str, str] = field(default_factory=dict)
    rows: str | None = None
    rows_sha256: str | None = None
    # Of the last attempt; None if the code was not a git checkout.
    git_sha: str | None = None
    git_dirty: bool | None = None
    versions: Mapping[str, str] = field(default_factory=dict)
    # Packages, machine and job of the last attempt.
    environment: Mapping[str, Any] = field(default_factory=dict)
    # `kwh` of all attempts, of so many `measured` GPUs `of` all; empty without a counter.
    energy: Mapping[str, float] = field(default_factory=dict)
    # Provenance of earlier attempts that ran with other code or packages.
    earlier: Sequence[Mapping[str, Any]] = ()
    device: str = "cpu"
    ranks: int = 1
    gpus: int = 0
    # Of all attempts together.
    seconds: float = 0.0
    gpu_hours: float = 0.0
    restarts: int = 0
    finished: str = ""

    @property
    def folder(self) -> str:
        """Folder of the run below the run root."""
        return f"{self.stage}/{self.name}-{self.run_id}"

    def science(self) -> dict[str, Any]:
        """Return the settings that can change a result, by dotted name."""
        # A runtime setting may be a group of settings.
        groups = tuple(f"{name}." for name in self.runtime)
        return {
            key: value
            for key, value in flatten_config(self.config).items()
            if not f"{key}.".startswith(groups)
        }


def run_from_entry(entry: Mapping[str, Any], runtime: Collection[str] = ()) -> FinishedRun:
    """Return the run of a manifest entry (its JSON)."""
    # Entries of older versions lack some of the fields; the defaults above stand in.
    provenance = entry.get("provenance") or {}
    return FinishedRun(
        **{key: entry[key] for key in _COPIED_FIELDS if key in entry},
        runtime=frozenset(runtime),
        outputs={label: output["path"] for label, output in (entry.get("outputs") or {}).items()},
        git_sha=provenance.get("git_sha"),
        git_dirty=provenance.get("git_dirty"),
        versions=provenance.get("versions") or {},
        environment=provenance.get("environment") or {},
        energy=provenance.get("energy") or {},
        earlier=_list_other_code(provenance),
    )


# What tables, figures and report make use of in the parts of a record that stages fill freely.
_PLAIN_SETTINGS = ("arch", "method", "dataset", "weights", "variant", "epochs")
_PLAIN_FACTS = ("arch", "method", "dataset", "weights", "trained_feature")
_LOSS_WEIGHTS = "mugs.loss_weights"


def check_types(run: FinishedRun) -> None:
    """Raise ValueError if the record of a run has a value of another type than is made use of.

    Whoever may write in the run root can record a run, with a checksum that fits.
    """
    config = flatten_config(run.config)
    for part, values, keys in (
        ("config", config, _PLAIN_SETTINGS),
        ("info", run.info, _PLAIN_FACTS),
        ("provenance", {"git_sha": run.git_sha, "git_dirty": run.git_dirty}, ("git_sha",)),
    ):
        for key in keys:
            _check_kind(f"{part}.{key}", values.get(key), str | int | float)
    _check_kind("info.epochs", run.info.get("epochs"), int)
    weights = config.get(_LOSS_WEIGHTS) or [1.0] * 3
    _check_kind(f"config.{_LOSS_WEIGHTS}", weights, list | tuple)
    if len(weights) != 3 or not all(isinstance(weight, int | float) for weight in weights):
        raise ValueError(f"config.{_LOSS_WEIGHTS}: expected three numbers")
    for name in ("captions", "colours"):
        _check_kind(f"info.{name}", run.info.get(name), Mapping)
    for label, colors in (run.info.get("colours") or {}).items():
        _check_kind(f"info.colours.{label}", colors, Mapping)
    for label, caption in (run.info.get("captions") or {}).items():
        _check_kind(f"info.captions.{label}", caption, str)
    _check_kind("info.notes", run.info.get("notes"), list | tuple)
    _check_kind("provenance.energy", run.energy, Mapping)
    for name in ("kwh", "measured", "of") if run.energy else ():
        if run.energy.get(name) is None:
            raise ValueError(f"provenance.energy: without {name}")
        _check_kind(f"provenance.energy.{name}", run.energy[name], int | float)
    _check_code("provenance", {"git_dirty": run.git_dirty, "versions": run.versions})
    for each in run.earlier:
        _check_kind("provenance.earlier", each, Mapping)
        _check_kind("provenance.earlier.attempt", each["attempt"], int)
        _check_code("provenance.earlier", each)


def _check_code(where: str, facts: Mapping[str, Any]) -> None:
    _check_kind(f"{where}.git_dirty", facts.get("git_dirty"), bool)
    _check_kind(f"{where}.versions", facts.get("versions"), Mapping)


def _check_kind(where: str, value: object, kind: Any) -> None:
    """Raise ValueError unless a value is None or of a kind; numbers are finite and not huge."""
    if value is None:
        return
    if not isinstance(value, kind) or (isinstance(value, int | float) and not abs(value) < 1e15):
        raise ValueError(f"{where}: unexpected {type(value).__name__}")


def _list_other_code(provenance: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    """Return the earlier attempts with other code or packages than the last one."""
    keys = ("git_sha", "git_dirty", "snapshot", "versions")
    return [
        each
        for each in provenance.get("earlier") or ()
        if any(each.get(key) != provenance.get(key) for key in keys)
    ]


def group_by(items: Iterable[Item], key: Callable[[Item], Key]) -> dict[Key, list[Item]]:
    """Return the items by their key; keys and items stay in order."""
    groups: dict[Key, list[Item]] = {}
    for item in items:
        groups.setdefault(key(item), []).append(item)
    return groups


def flatten_config(config: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Return nested mappings as one with dotted keys; lists stay, tuples become lists."""
    found: dict[str, Any] = {}
    for key, value in config.items():
        if isinstance(value, Mapping):
            found |= flatten_config(value, f"{prefix}{key}.")
        else:
            found[f"{prefix}{key}"] = tuples_to_lists(value)
    return found


def tuples_to_lists(value: Any) -> Any:
    """Return tuples as lists, at every depth, so that a configuration equals its JSON."""
    if isinstance(value, list | tuple):
        return [tuples_to_lists(item) for item in value]
    return value


def iter_with_upstream(run_id: str, runs: Mapping[str, FinishedRun]) -> Iterator[FinishedRun]:
    """Yield a run and all that it needs, directly or not: each once, the nearest first.

    Runs without a record are left out.
    """
    # Breadth first: of two pretrainings on the way, the nearer one is what an evaluation is about.
    queue = [run_id]
    seen = set()
    while queue:
        current = queue.pop(0)
        if current in seen or current not in runs:
            continue
        seen.add(current)
        yield runs[current]
        queue += [needed for _, needed in sorted(runs[current].upstream.items())]


def sort_by_dependency(runs: Sequence[FinishedRun]) -> list[FinishedRun]:
    """Return the runs, each after those it needs, otherwise by stage and name."""
    left = sorted(runs, key=lambda run: (run.stage, run.name, run.run_id))
    waiting = {run.run_id for run in runs}
    ordered: list[FinishedRun] = []
    while left:
        # Records that need each other in a circle are damaged; show them rather than loop for ever.
        ready = [run for run in left if waiting.isdisjoint(run.upstream.values())] or left
        ordered += ready
        waiting -= {run.run_id for run in ready}
        left = [run for run in left if run.run_id in waiting]
    return ordered
