"""All runs of a run root, of whatever reproduction, from the files in their folders."""

import dataclasses
import hashlib
import json
import os
import time
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ValidationError

from pipeline import runfile
from pipeline.files import cache_folder, read_bounded, write_atomic
from pipeline.identity import RETIRED_SETTINGS
from pipeline.plan import select_runs
from pipeline.reading import validate_model
from pipeline.settings import Settings
from pipeline.spec import ConfigError, Resources, StageConfig, StageRun
from stages import STAGES
from stages.commands.clean import find_run_folders

# A file that changed right before it was read may change again within the same tick of the clock.
SETTLED_NS = 5 * 10**9


class UnreadConfig(StageConfig):
    """Stands for settings that were not read again; it has none of them."""


class RunSummary(BaseModel):
    """What is shown of a run, from its file as it was at `stamp`."""

    stamp: tuple[int, int, int, int]
    stage: str
    name: str
    run_id: str
    needs: dict[str, str]
    resources: Resources
    settings: str

    def build(self) -> StageRun:
        """Return the run, without its settings."""
        entrypoint = STAGES[self.stage].entrypoint
        return StageRun(
            self.stage,
            self.name,
            self.run_id,
            UnreadConfig(),
            self.needs,
            self.resources,
            entrypoint,
        )


class RememberedRuns(BaseModel):
    """Summaries by folder name, as settings with these `defaults` gave them."""

    defaults: str
    runs: dict[str, RunSummary] = {}


def load_all_runs(root: Path, only: Sequence[str]) -> tuple[list[StageRun], list[str], list[str]]:
    """Return the runs that have a folder, a line of settings for each, and what is unreadable.

    With `only`, the runs of these names or stages. Classes come from our stages, not from the
    files, so nothing that a file names is imported. Reading ten thousand files takes half a minute;
    so what they say is remembered, and read again if a file has another size, time or number.
    """
    memory = _memory_path(root)
    known = _read_memory(memory)
    found: dict[str, RunSummary] = {}
    problems = []
    for folder in sorted(find_run_folders(root), key=str):
        key = f"{folder.parent.name}/{folder.name}"
        try:
            stamp = _stamp(folder)
            summary = known.runs.get(key)
            if summary is None or summary.stamp != stamp:
                summary = _summarize(folder, stamp)
            found[key] = summary
        except (ConfigError, ValueError, LookupError, TypeError, OSError) as error:
            problems.append(f"{folder}: {str(error).splitlines()[0] if str(error) else error!r}")
    settled = time.time_ns() - SETTLED_NS
    lasting = {
        key: run
        for key, run in found.items()
        if run is known.runs.get(key) or max(run.stamp[1:3]) < settled
    }
    _write_memory(memory, known, lasting)
    lines = {summary.run_id: summary.settings for summary in found.values()}
    runs = select_runs([summary.build() for summary in found.values()], only)
    return runs, [f"{run.key}: {lines[run.run_id]}" for run in runs], problems


def remember_runs(root: Path, runs: Sequence[StageRun]) -> None:
    """Remember runs whose files we have just written, so that they need not be read.

    Their files were put in place by renaming: one that is written later has another number.
    """
    if not runs:
        return  # what is remembered of ten thousand others is not read for nothing
    memory = _memory_path(root)
    known = _read_memory(memory)
    found = dict(known.runs)
    for run in runs:
        folder = run.run_dir(root)
        with suppress(OSError):
            found[f"{run.stage}/{folder.name}"] = RunSummary(
                stamp=_stamp(folder),
                stage=run.stage,
                name=run.own_name or run.name,
                run_id=run.run_id,
                needs=dict(run.needs),
                resources=run.resources,
                settings=describe_settings(run.config),
            )
    _write_memory(memory, known, found)


def list_namesakes(runs: Sequence[StageRun], root: Path) -> list[str]:
    """Return a line if runs have not begun and the run root has others of their names.

    They have other settings: often a --set is missing.
    """
    waiting = [run for run in runs if not run.run_dir(root).exists()]
    there: set[tuple[str, str]] = set()
    for stage in sorted({run.stage for run in waiting}):
        with suppress(OSError):
            there |= {(stage, name.rpartition("-")[0]) for name in os.listdir(root / stage)}
    names = [run.name for run in waiting if (run.stage, run.own_name or run.name) in there]
    if not names:
        return []
    return [
        f"note: {', '.join(names)} not begun with these settings; {root} has runs of the same name "
        "with others: status without a reproduction shows them"
    ]


def _summarize(folder: Path, stamp: tuple[int, int, int, int]) -> RunSummary:
    """Return the summary of a run from its file.

    Raises:
        ConfigError, ValueError, LookupError, TypeError, OSError: the file cannot be read.
    """
    found = runfile.read_run_file(folder)
    settings = {key: value for key, value in found.config.items() if key not in RETIRED_SETTINGS}
    config = validate_model(STAGES[found.stage].config, settings, str(folder))
    return RunSummary(
        stamp=stamp,
        stage=found.stage,
        name=found.name,
        run_id=found.run_id,
        needs=found.needs,
        resources=Resources.model_validate(found.resources),
        settings=describe_settings(config),
    )


def _stamp(folder: Path) -> tuple[int, int, int, int]:
    """Return what tells that a run's file is another one."""
    found = os.stat(f"{folder}/{runfile.FILE_NAME}")
    return found.st_size, found.st_mtime_ns, found.st_ctime_ns, found.st_ino


def _memory_path(root: Path) -> Path | None:
    folder = cache_folder()
    name = hashlib.sha256(os.fsencode(root.absolute())).hexdigest()[:16]
    return folder and folder / "run_roots" / f"{name}.json"


def _read_memory(path: Path | None) -> RememberedRuns:
    """Return what is remembered; nothing if it is damaged or of code with other defaults."""
    defaults = _hash_defaults()
    if path is not None:
        with suppress(OSError, ValidationError):
            known = RememberedRuns.model_validate_json(read_bounded(path))
            if known.defaults == defaults:
                return known
    return RememberedRuns(defaults=defaults)


def _write_memory(path: Path | None, known: RememberedRuns, runs: dict[str, RunSummary]) -> None:
    """Remember these runs; a folder that cannot be written is no reason to fail."""
    if path is not None and runs != known.runs:
        with suppress(OSError):
            write_atomic(path, known.model_copy(update={"runs": runs}).model_dump_json())


def _hash_defaults() -> str:
    """Return a hash of the default of each setting of each stage."""
    return hashlib.sha256(json.dumps(_list_defaults()).encode()).hexdigest()


def _list_defaults() -> list[str]:
    """Return a text for each setting of each stage, with its default."""
    return [
        f"{stage}.{field.name}={None if default is dataclasses.MISSING else default!r}"
        for stage, spec in STAGES.items()
        for field in dataclasses.fields(spec.config)
        for default in [_default_of(field)]
    ]


def describe_settings(settings: Settings) -> str:
    """Return the settings that differ from the defaults: `epochs=100 mugs.drop_path=0.2`."""
    return " ".join(_list_changes(settings)) or "default settings"


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
