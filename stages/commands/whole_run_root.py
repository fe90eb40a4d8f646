"""All runs of a run root, of whatever reproduction, from the files in their folders."""

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from pipeline import runfile
from pipeline.identity import RETIRED_SETTINGS
from pipeline.plan import select_runs
from pipeline.reading import validate_model
from pipeline.settings import Settings
from pipeline.spec import ConfigError, Resources, StageRun
from stages import STAGES
from stages.commands.clean import find_run_folders


def load_all_runs(root: Path, only: Sequence[str]) -> tuple[list[StageRun], list[str]]:
    """Return the runs that have a folder, and a line for each folder that cannot be read.

    With `only`, the runs of these names or stages. Classes come from our stages, not from the
    files, so nothing that a file names is imported.
    """
    runs = []
    problems = []
    for folder in sorted(find_run_folders(root)):
        try:
            found = runfile.read_run_file(folder)
            spec = STAGES[found.stage]
            settings = {
                key: value for key, value in found.config.items() if key not in RETIRED_SETTINGS
            }
            runs.append(
                StageRun(
                    found.stage,
                    found.name,
                    found.run_id,
                    validate_model(spec.config, settings, str(folder)),
                    found.needs,
                    Resources.model_validate(found.resources),
                    spec.entrypoint,
                )
            )
        except (ConfigError, ValueError, LookupError, TypeError, OSError) as error:
            problems.append(f"{folder}: {str(error).splitlines()[0] if str(error) else error!r}")
    return select_runs(runs, only), problems


def describe_settings(run: StageRun) -> str:
    """Return the settings that differ from the defaults: `epochs=100 mugs.drop_path=0.2`."""
    return " ".join(_list_changes(run.config)) or "default settings"


def _list_changes(settings: Settings, path: str = "") -> list[str]:
    changes: list[str] = []
    for field in dataclasses.fields(settings):
        value = getattr(settings, field.name)
        if isinstance(value, Settings):
            changes += _list_changes(value, f"{path}{field.name}.")
        elif value != _default_of(field):
            changes.append(f"{path}{field.name}={value}")
    return changes


def _default_of(field: dataclasses.Field[Any]) -> Any:
    if field.default_factory is not dataclasses.MISSING:
        return field.default_factory()
    return field.default
