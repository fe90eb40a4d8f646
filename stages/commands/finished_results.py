"""Results of the finished runs of a run root, compared with the bundled reproductions."""

from collections.abc import Mapping, Sequence
from pathlib import Path

from pipeline import config, manifest
from pipeline.config import RunConfig
from pipeline.identity import runtime_names, science
from pipeline.spec import ConfigError, StageRun
from results import publish
from results.collect import CollectedResults, collect_results
from results.runs import flatten_config, run_from_entry
from results.variants import ReferenceReproduction, ReferenceRun
from stages import STAGES
from stages.shared.presets import paper


def collect_finished(root: Path, runs: Sequence[StageRun] | None = None) -> CollectedResults:
    """Results of the given runs as far as they are done, else of all that are; what is refused is named in it."""
    ids = manifest.list_run_ids(root) if runs is None else [run.run_id for run in runs]
    entries = [
        entry for identity in ids if (entry := manifest.find_done(root, identity, rows=False))
    ]
    runtime = {name: runtime_names(spec.config) for name, spec in STAGES.items()}
    found = [
        run_from_entry(entry.model_dump(mode="json"), runtime.get(entry.stage, ()))
        for entry in entries
    ]
    return collect_results(root, found, load_references() if found else ())


def load_comparison(folder: Path, runs: Sequence[StageRun] | None = None) -> CollectedResults:
    """Results of another run root, or of a published folder. Raises ConfigError where there is none."""
    folder = folder.expanduser().absolute()
    if not folder.is_dir():
        raise ConfigError(f"--against {folder}: there is no such folder")
    return (
        publish.read_published(folder)
        if publish.is_published(folder)
        else collect_finished(folder, runs)
    )


def load_references() -> list[ReferenceReproduction]:
    """The bundled reproductions: what the settings of a finished run are compared with."""
    found = []
    for name in config.bundled():
        runs = config.load(name, STAGES).runs
        own = [
            ReferenceRun(run.spec.name, _dataset(key, runs), science(run.config))
            for key, run in runs.items()
        ]
        found.append(ReferenceReproduction(name, tuple(own)))
    return found


def _dataset(name: str, runs: Mapping[str, RunConfig]) -> str:
    """The data set that a run of a reproduction is about: its own, else that of what it takes data or features of."""
    run = runs[name]
    own = getattr(run.config, "dataset", None)
    sources = [run.needs[role] for role in ("data", "features") if role in run.needs]
    return str(own or (_dataset(sources[0], runs) if sources else ""))


def find_paper_differences(collection: CollectedResults) -> dict[str, list[str]]:
    """By pretraining: its settings beside what the paper's text says where that differs from the release."""
    return {
        run.run_id: [
            f"{key}={flatten_config(run.config)[key]}, the paper says {value}"
            for key, value in flatten_config(paper(str(run.config.get("arch")))).items()
            if key in flatten_config(run.config) and flatten_config(run.config)[key] != value
        ]
        for run in collection.runs.values()
        if run.stage == "pretrain"
    }
