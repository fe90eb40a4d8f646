"""Finished runs as tables, report and `--explain` see them: their manifest entries."""

from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True)
class FinishedRun:
    """A manifest entry; `config` holds every field, `runtime` the dotted names of those that change no number."""

    run_id: str
    stage: str
    name: str
    upstream: Mapping[str, str] = field(default_factory=dict)
    config: Mapping[str, Any] = field(default_factory=dict)
    runtime: frozenset[str] = frozenset()
    info: Mapping[str, Any] = field(default_factory=dict)
    outputs: Mapping[str, str] = field(default_factory=dict)
    rows: str | None = None
    rows_sha256: str | None = None
    git_sha: str | None = None
    git_dirty: bool | None = None
    versions: Mapping[str, str] = field(default_factory=dict)
    device: str = "cpu"
    ranks: int = 1
    gpus: int = 0
    seconds: float = 0.0
    gpu_hours: float = 0.0
    restarts: int = 0
    finished: str = ""

    @property
    def folder(self) -> str:
        """Folder of the run below the run root."""
        return f"{self.stage}/{self.name}-{self.run_id}"

    def science(self) -> dict[str, Any]:
        """Dotted fields of the configuration that can change a number."""
        return {
            key: value
            for key, value in flatten_config(self.config).items()
            if not self._is_runtime(key)
        }

    def _is_runtime(self, key: str) -> bool:
        return any(key == name or key.startswith(f"{name}.") for name in self.runtime)


def run_from_entry(entry: Mapping[str, Any], runtime: Collection[str] = ()) -> FinishedRun:
    """The run of a manifest entry (its JSON)."""
    provenance = entry.get("provenance") or {}
    taken = (
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
    )
    costs = ("seconds", "gpu_hours", "restarts", "finished")
    return FinishedRun(
        **{key: entry[key] for key in (*taken, *costs) if key in entry},
        runtime=frozenset(runtime),
        outputs={label: output["path"] for label, output in (entry.get("outputs") or {}).items()},
        git_sha=provenance.get("git_sha"),
        git_dirty=provenance.get("git_dirty"),
        versions=provenance.get("versions") or {},
    )


def flatten_config(config: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested mappings as dotted keys; lists stay, tuples become lists."""
    found: dict[str, Any] = {}
    for key, value in config.items():
        if isinstance(value, Mapping):
            found |= flatten_config(value, f"{prefix}{key}.")
        else:
            found[f"{prefix}{key}"] = tuples_to_lists(value)
    return found


def tuples_to_lists(value: Any) -> Any:
    """Tuples as lists, at every depth, so that a configuration equals its JSON."""
    return [tuples_to_lists(item) for item in value] if isinstance(value, list | tuple) else value


def iter_with_upstream(run_id: str, runs: Mapping[str, FinishedRun]) -> Iterator[FinishedRun]:
    """A run and all it needs, directly or not, each once, nearest first; runs without a record are left out."""
    todo, seen = [run_id], set()
    while todo:
        identity = todo.pop(0)
        if identity in seen or identity not in runs:
            continue
        seen.add(identity)
        yield runs[identity]
        todo.extend(run for _, run in sorted(runs[identity].upstream.items()))


def sort_by_dependency(runs: Sequence[FinishedRun]) -> list[FinishedRun]:
    """Each run after those it needs, otherwise by stage and name."""
    left = sorted(runs, key=lambda run: (run.stage, run.name, run.run_id))
    ids = {run.run_id for run in runs}
    ordered: list[FinishedRun] = []
    while left:
        placed = {run.run_id for run in ordered}
        ready = [
            run
            for run in left
            if all(need in placed or need not in ids for need in run.upstream.values())
        ]
        ordered += ready or left
        left = [run for run in left if run not in ordered]
    return ordered
