"""Results of the finished runs of a run root, compared with the bundled reproductions."""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

from pipeline import config, manifest
from pipeline.config import RunConfig
from pipeline.files import FormatVersionError, expand_home
from pipeline.identity import RETIRED_SETTINGS, runtime_names, science_fields
from pipeline.plan import build_plan
from pipeline.settings import use_record_names
from pipeline.spec import ConfigError, StageRun
from results import publish
from results.collect import CollectedResults, collect_results
from results.runs import check_types, flatten_config, run_from_entry
from results.variants import ReferenceReproduction, ReferenceRun
from stages import STAGES

PAPER_ARCHS = ("vit_s16", "vit_b16", "vit_l16")


def collect_finished(root: Path, runs: Sequence[StageRun] = ()) -> CollectedResults:
    """Return the results of those `runs` that are done, or of every finished run without `runs`.

    Rows that are refused do not raise; they are listed in the collection.
    """
    ids = [run.run_id for run in runs] or manifest.list_run_ids(root)
    runtime = {name: runtime_names(spec.config) | RETIRED_SETTINGS for name, spec in STAGES.items()}
    # The rows are not checked here: collecting them reports a damaged file with its line.
    entries = []
    refused = []
    for run_id in ids:
        try:
            entry = manifest.find_done(root, run_id, rows=False)
        except FormatVersionError as error:
            # The results of the other runs are shown nevertheless.
            refused.append(str(error))
            continue
        if entry is not None:
            entries.append(entry)
    finished = []
    for entry in entries:
        try:
            run = run_from_entry(entry.model_dump(mode="json"), runtime.get(entry.stage, ()))
            check_types(run)
        except (ValueError, LookupError, TypeError, AttributeError, RecursionError) as error:
            path = manifest.entry_path(root, entry.run_id)
            refused.append(f"unreadable: {path}: {str(error) or type(error).__name__}")
            continue
        finished.append(run)
    # Reading the bundled reproductions takes longer than all the rest; without results it is
    # useless.
    collection = collect_results(root, finished, load_references() if finished else ())
    return replace(collection, problems=(*refused, *collection.problems))


def load_comparison(folder: Path, runs: Sequence[StageRun] = ()) -> CollectedResults:
    """Return the results of another run root, or of a published folder.

    Raises:
        ConfigError: there is no such folder, or it has no results.
    """
    # A shell does not expand "~" after "--against=".
    folder = expand_home(folder).absolute()
    if not folder.is_dir():
        raise ConfigError(f"--against {folder}: there is no such folder")
    # A published folder has no manifest; its runs.json stands in for it.
    published = publish.is_published(folder)
    found = publish.read_published(folder) if published else collect_finished(folder, runs)
    if not found.results and not found.problems:
        raise ConfigError(
            f"--against {folder}: no results of these runs are there; give a run root, or a"
            " published folder such as results/published/mini"
        )
    return found


def load_references() -> list[ReferenceReproduction]:
    """Return the bundled reproductions, with which the settings of finished runs are compared."""
    found = []
    for name in config.list_bundled():
        reproduction = config.load_reproduction(name, STAGES)
        if reproduction.joined:
            continue  # its runs are those of others
        # As planned: what follows from the inputs, such as the steps of an epoch, is filled in.
        own = [
            ReferenceRun(
                run.stage, _dataset_of(run.name, reproduction.runs), science_fields(run.config)
            )
            for run in build_plan(reproduction)
        ]
        found.append(ReferenceReproduction(tuple(own)))
    return found


def _dataset_of(name: str, runs: Mapping[str, RunConfig]) -> str:
    """Return the data set of a run: its own, else that of the run it gets data from."""
    run = runs[name]
    if own := getattr(run.config, "dataset", None):
        return str(own)
    sources = [run.needs[role] for role in ("data", "features") if role in run.needs]
    return _dataset_of(sources[0], runs) if sources else ""


def find_paper_differences(collection: CollectedResults) -> dict[str, list[str]]:
    """Return, for each pretraining, its settings that differ from what the paper's text says."""
    found: dict[str, list[str]] = {}
    for run in collection.runs.values():
        if run.stage != "pretrain":
            continue
        ours = flatten_config(run.config)
        # One recipe is for the mini network and others that are not in the paper.
        arch = f"_{run.config['arch']}" if run.config.get("arch") in PAPER_ARCHS else ""
        recipe = config.load_recipe(f"pretrain/paper{arch}")
        # The paper's text is about its own method; the recipe has a section of its settings.
        if run.config.get("method") not in recipe:
            continue
        paper = use_record_names(STAGES[run.stage].config, recipe)
        found[run.run_id] = [
            f"{key}={ours[key]}, the paper says {value}"
            for key, value in flatten_config(paper).items()
            if key in ours and ours[key] != value
        ]
    return found
