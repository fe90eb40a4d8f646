"""The file of a stage run, `<run_dir>/config.yaml`, from which its jobs start.

It holds its own checksum, so that a job does what was planned. To change a run, change the
reproduction.
"""

import importlib
import logging
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from pipeline.files import (
    CHECKSUM_KEY,
    ChecksumError,
    read_bounded,
    verify_checksum,
    with_checksum,
    write_atomic,
)
from pipeline.identity import RETIRED_SETTINGS, dump_settings
from pipeline.ownership import (
    ForeignOwnerError,
    check_mine,
    close_to_others,
    find_foreign_owner,
)
from pipeline.reading import format_choices, parse_yaml, read_config_text, validate_model
from pipeline.run_root import make_shared_folder, mark_run_root
from pipeline.spec import ROWS_WRITER, ConfigError, Resources, StageRun, StageSpec

logger = logging.getLogger(__name__)
FILE_NAME = "config.yaml"
STAGE_MODULES_VARIABLE = "MUGS_STAGE_MODULES"
FOREIGN_REMEDY = "use a run root of your own, or let its owner finish or remove it"


def find_other_beginner(run_root: Path, run: StageRun) -> str:
    """Return which other user has begun a run, and what to do; "" if nobody has."""
    owner = find_foreign_owner(run.run_dir(run_root))
    return f"begun by {owner}: {FOREIGN_REMEDY}" if owner else ""


@dataclass(frozen=True)
class RunFile:
    """Content of the file; classes and functions are text (`module:name`).

    The stage's name says what the job imports. The text counts only for modules that the user names
    in the environment, since whoever may write the file could name any other.
    """

    stage: str
    name: str
    run_id: str
    needs: dict[str, str]
    entrypoint: str
    config_class: str
    rows_writer: str
    resources: dict[str, Any]
    config: dict[str, Any]

    def build(self) -> StageRun:
        """Find the stage, check the configuration, and return the stage run."""
        spec = self._find_stage()
        cls = spec.config
        settings = {k: v for k, v in self.config.items() if k not in RETIRED_SETTINGS}
        config = validate_model(cls, settings, f"{self.name}-{self.run_id}/{FILE_NAME}")
        resources = Resources.model_validate(self.resources)
        return StageRun(
            self.stage,
            self.name,
            self.run_id,
            config,
            self.needs,
            resources,
            spec.entrypoint,
            spec.rows_writer,
        )

    def _find_stage(self) -> StageSpec:
        """Return the stage of this name; what the file says of code is not imported.

        Only modules in MUGS_STAGE_MODULES, names with commas, may have stages of their own.
        """
        registry: Mapping[str, StageSpec] = importlib.import_module("stages").STAGES
        if self.stage in registry:
            return registry[self.stage]
        trusted = os.environ.get(STAGE_MODULES_VARIABLE, "").split(",")
        for text in (self.entrypoint, self.config_class, self.rows_writer):
            if text != ROWS_WRITER and text.partition(":")[0] not in trusted:
                raise ConfigError(f"no stage {self.stage!r}{format_choices(self.stage, registry)}")
        import_by_name(self.entrypoint)  # to say so if it is not there
        config: Any = import_by_name(self.config_class)
        return StageSpec(self.stage, config, self.entrypoint, rows_writer=self.rows_writer)


def import_by_name(text: str) -> Callable[..., Any]:
    """Return what `package.module:name` names.

    Raises:
        ConfigError: there is no such module, or it has no such name.
    """
    module, _, name = text.partition(":")
    try:
        found = getattr(importlib.import_module(module), name)
    except ModuleNotFoundError as error:
        # A module that this one imports may be missing too: that is another error, raised as it is.
        if error.name is not None and (module == error.name or module.startswith(f"{error.name}.")):
            raise ConfigError(f"{text}: there is no module {error.name!r}") from error
        raise
    except AttributeError as error:
        raise ConfigError(f"{text}: module {module!r} has no {name!r}") from error
    assert callable(found)
    return found  # type: ignore[no-any-return]


def describe_run(run: StageRun) -> dict[str, Any]:
    """Return the content of a run's file, with its checksum."""
    cls = type(run.config)
    content = {
        "stage": run.stage,
        "name": run.own_name or run.name,
        "run_id": run.run_id,
        "needs": dict(run.needs),
        "entrypoint": run.entrypoint,
        "config_class": f"{cls.__module__}:{cls.__qualname__}",
        "rows_writer": run.rows_writer,
        "resources": run.resources.model_dump(mode="json"),
        "config": dump_settings(run.config),
    }
    return with_checksum(content)


def prepare_run_dir(run_root: Path, run: StageRun) -> Path:
    """Make the folders in which a run is kept; its own one only this user can change. Return that.

    Raises:
        ForeignOwnerError: the run's folder belongs to another user.
        ConfigError: this user may not write in the run root.
    """
    run_dir = run.run_dir(run_root)
    try:
        mark_run_root(run_root)
        for name in (run.stage, "manifest"):
            make_shared_folder(run_root, name)
        check_mine(run_dir, FOREIGN_REMEDY)
        run_dir.mkdir(mode=0o755, exist_ok=True)
        # Before a job writes there: what others could put there would be taken for ours.
        for path in close_to_others(run_dir):
            logger.warning("%s: another user put this here; it was renamed, and is not used", path)
    except ForeignOwnerError:
        raise
    except PermissionError as error:
        raise ConfigError(
            f"{error.filename}: you may not write there; use a run root of your own (--run-root), "
            "or let its owner share it as docs/security.md says"
        ) from None
    return run_dir


def write_run_file(run_root: Path, run: StageRun) -> Path:
    """Write the run's file and return the run's folder."""
    run_dir = prepare_run_dir(run_root, run)
    write_atomic(run_dir / FILE_NAME, yaml.safe_dump(describe_run(run), sort_keys=False))
    return run_dir


def begins_as(path: Path, stage: str, name: str, run_id: str) -> bool:
    """Return whether a file begins like the file of a run. Cheap: it is not parsed."""
    head = yaml.safe_dump({"stage": stage, "name": name, "run_id": run_id}, sort_keys=False)
    try:
        return read_bounded(path).startswith(head.encode())
    except OSError:
        return False


def find_run_dir(run_root: Path, run_id: str) -> Path | None:
    """Return the folder of a run that has begun or is queued, or None."""
    return next((path.parent for path in run_root.glob(f"*/*-{run_id}/{FILE_NAME}")), None)


def read_run_file(run_dir: Path, expected_sha256: str | None = None) -> RunFile:
    """Return the content of a run's file.

    Raises:
        ConfigError: the file is missing, damaged, of another run, or has not the expected checksum.
    """
    path = run_dir / FILE_NAME
    content = parse_yaml(str(path), read_config_text(path))
    try:
        found = RunFile(**verify_checksum(content))
    except ChecksumError as error:
        raise ConfigError(
            f"{path}: {error}; run or submit the reproduction to have it written anew"
        ) from None
    except TypeError:
        raise ConfigError(
            f"{path}: expected the keys {', '.join(RunFile.__annotations__)}"
        ) from None
    # A copied or renamed folder would otherwise record results under a wrong name.
    if run_dir.parts[-2:] != (found.stage, f"{found.name}-{found.run_id}"):
        raise ConfigError(f"{path}: is of the {found.stage} run {found.name}-{found.run_id}")
    if expected_sha256 not in (None, content[CHECKSUM_KEY]):
        raise ConfigError(f"{path}: is not what this job was submitted with; submit again")
    return found
