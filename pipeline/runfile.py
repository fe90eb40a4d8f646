"""The file of a stage run, `<run_dir>/config.yaml`, from which its jobs start.

It holds its own checksum, so that a job does what was planned. To change a run, change the
reproduction.
"""

import importlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from pipeline.files import (
    ChecksumError,
    read_bounded,
    verify_checksum,
    with_checksum,
    write_atomic,
)
from pipeline.identity import RETIRED_SETTINGS, dump_settings
from pipeline.reading import parse_yaml, read_config_text, validate_model
from pipeline.run_root import mark_run_root
from pipeline.spec import ConfigError, Resources, StageConfig, StageRun, StageSpec

FILE_NAME = "config.yaml"


@dataclass(frozen=True)
class RunFile:
    """Content of the file; classes and functions are text (`module:name`), imported in the job."""

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
        """Import the stage's module, check the configuration, and return the stage run."""
        cls = self._find_config_class()
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
            self.entrypoint,
            self.rows_writer,
        )

    def _find_config_class(self) -> type[StageConfig]:
        # The stage's own declaration counts: a class may have been renamed since the file was
        # written.
        import_by_name(self.entrypoint)  # to say so if it is not there
        module = importlib.import_module(self.entrypoint.partition(":")[0])
        spec = getattr(module, "SPEC", None)
        cls = spec.config if isinstance(spec, StageSpec) else import_by_name(self.config_class)
        assert isinstance(cls, type)
        assert issubclass(cls, StageConfig)
        return cls


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


def write_run_file(run_root: Path, run: StageRun) -> Path:
    """Write the run's file and return the run's folder."""
    cls = type(run.config)
    content = {
        "stage": run.stage,
        "name": run.name,
        "run_id": run.run_id,
        "needs": dict(run.needs),
        "entrypoint": run.entrypoint,
        "config_class": f"{cls.__module__}:{cls.__qualname__}",
        "rows_writer": run.rows_writer,
        "resources": run.resources.model_dump(mode="json"),
        "config": dump_settings(run.config),
    }
    run_dir = run.run_dir(run_root)
    mark_run_root(run_root)
    write_atomic(run_dir / FILE_NAME, yaml.safe_dump(with_checksum(content), sort_keys=False))
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


def read_run_file(run_dir: Path) -> RunFile:
    """Return the content of a run's file.

    Raises:
        ConfigError: the file is missing, damaged, or of another run.
    """
    path = run_dir / FILE_NAME
    try:
        found = RunFile(**verify_checksum(parse_yaml(str(path), read_config_text(path))))
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
    return found
