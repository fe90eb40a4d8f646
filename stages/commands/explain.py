"""The option `plan --explain`: where each setting of a run comes from."""

import json
from collections.abc import Mapping, Sequence
from typing import Any

from pydantic_core import to_jsonable_python

from pipeline.explain import explain_run
from pipeline.reading import format_choices
from pipeline.spec import ConfigError, StageRun
from stages import STAGES
from stages.commands.reproduction import all_runs
from stages.shared.frozen import list_settings_of_features

NO_EFFECT = "no effect: that of the features run counts"
HEADER = ("setting", "value", "from", "in run id")


def find_run(
    reproduction: str,
    name: str,
    overrides: Sequence[str] | None,
    seeds: Sequence[str] | None = None,
) -> StageRun:
    """Return a run of a reproduction.

    Raises:
        ConfigError: there is no run of this name.
    """
    runs = {run.name: run for run in all_runs(reproduction, overrides, seeds)}
    if name not in runs:
        raise ConfigError(f"--explain {name}: no such run{format_choices(name, runs)}")
    return runs[name]


def tabulate_settings(
    reproduction: str,
    run: StageRun,
    overrides: Sequence[str] | None,
    from_profile: Mapping[str, tuple[Any, str]],
) -> list[tuple[str, ...]]:
    """Return a line, as in HEADER, for each setting and resource of a run.

    `from_profile` has the resources that a cluster profile decides, each with the profile's name.
    """
    elsewhere = list_settings_of_features(type(run.config), run.needs)
    return [
        (
            line.name,
            json.dumps(to_jsonable_python(line.value)),
            NO_EFFECT if line.name in elsewhere else line.source,
            "yes" if line.in_run_id else "no",
        )
        for line in explain_run(reproduction, STAGES, run, overrides or (), from_profile)
    ]
