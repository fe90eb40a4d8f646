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
