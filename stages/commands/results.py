"""Results of the finished runs of a run root, compared with the bundled reproductions."""

from collections.abc import Mapping, Sequence
from pathlib import Path

from pipeline import config, manifest
from pipeline.config import RunConfig
from pipeline.identity import runtime_names, science
from pipeline.spec import ConfigError, StageRun
from results import publish
from results.collect import Collection, collect
from results.runs import flat, from_entry
from results.variants import Recipe, Reference
from stages import STAGES
from stages.shared.presets import paper


def collected(root: Path, runs: Sequence[StageRun] | None = None) -> Collection:
    """Results of the given runs as far as they are done, else of all that are; what is refused is named in it."""
    ids = manifest.run_ids(root) if runs is None else [run.run_id for run in runs]
    entries = [
        entry for identity in ids if (entry := manifest.find_done(root, identity, rows=False))
    ]
    runtime = {name: runtime_names(spec.config) for name, spec in STAGES.items()}
    found = [
        from_entry(entry.model_dump(mode="json"), runtime.get(entry.stage, ())) for entry in entries
    ]
    return collect(root, found, recipes() if found else ())


def rivals(folder: Path, runs: Sequence[StageRun] | None = None) -> Collection:
    """Results of another run root, or of a published folder. Raises ConfigError where there is none."""
    folder = folder.expanduser().absolute()
    if not folder.is_dir():
        raise ConfigError(f"--against {folder}: there is no such folder")
    return publish.read(folder) if publish.is_published(folder) else collected(folder, runs)


def recipes() -> list[Reference]:
    """The bundled reproductions: what the settings of a finished run are compared with."""
    found = []
    for name in config.bundled():
        runs = config.load(name, STAGES).runs
        own = [
            Recipe(run.spec.name, _dataset(key, runs), science(run.config))
            for key, run in runs.items()
        ]
        found.append(Reference(name, tuple(own)))
    return found


def _dataset(name: str, runs: Mapping[str, RunConfig]) -> str:
    """The data set that a run of a reproduction is about: its own, else that of what it takes data or features of."""
    run = runs[name]
    own = getattr(run.config, "dataset", None)
    sources = [run.needs[role] for role in ("data", "features") if role in run.needs]
    return str(own or (_dataset(sources[0], runs) if sources else ""))


def paper_says(collection: Collection) -> dict[str, list[str]]:
    """By pretraining: its settings beside what the paper's text says where that differs from the release."""
    return {
        run.run_id: [
            f"{key}={flat(run.config)[key]}, the paper says {value}"
            for key, value in flat(paper(str(run.config.get("arch")))).items()
            if key in flat(run.config) and flat(run.config)[key] != value
        ]
        for run in collection.runs.values()
        if run.stage == "pretrain"
    }
