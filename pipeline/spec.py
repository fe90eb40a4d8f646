"""Shared vocabulary of the packages: the settings, resources, specs and runs of stages."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Annotated, Any, ClassVar

from pydantic import (
    AfterValidator,
    BaseModel,
    ConfigDict,
    Field,
    PrivateAttr,
    TypeAdapter,
    ValidationError,
)
from pydantic_core import PydanticCustomError

from pipeline.settings import Settings
from pipeline.text import clean_line

ROWS_WRITER = "results.store:write_rows"
"""Entry point, as text, of the function `(path, rows)` that stores the result rows of a stage."""


# These become parts of paths: no separator, and no leading dot.
PlainName = Annotated[str, Field(pattern=r"^\w[\w.-]*$", max_length=200)]
_PLAIN_NAME: TypeAdapter[str] = TypeAdapter(PlainName)


def _check_label(text: str) -> str:
    if not text[:1].isalnum() or clean_line(text) != text or "\t" in text:
        raise PydanticCustomError("label", "one line of text that begins with a letter or a digit")
    return text


# What result rows and tables call something. Refused before anything runs: a spreadsheet takes a
# cell that begins with "=" or "-" for a formula, and a line end would break a row.
Label = Annotated[str, AfterValidator(_check_label), Field(max_length=200)]


def is_plain_name(text: Any) -> bool:
    """Return whether a text may be the name of a run: whoever reads its entry asks the same."""
    try:
        _PLAIN_NAME.validate_python(text)
    except ValidationError:
        return False
    return True


class ConfigError(ValueError):
    """A mistake in a configuration; the message says in one line where, what, and what is right."""


@dataclass(frozen=True, kw_only=True)
class StageConfig(Settings):
    """Base of every stage's configuration."""

    # Whether one process does everything, so that more of them would wait or do the same.
    one_rank: ClassVar[bool] = False

    # The hooks below are called when a plan is made, before a job is queued. `inputs` are the
    # configurations of the inputs, by role.

    def complete_from(self, inputs: Mapping[str, StageConfig]) -> StageConfig:
        """Return this configuration with settings filled in that follow from the inputs.

        What is filled in is part of the run id like any other setting.
        """
        return self

    def list_facts(self, inputs: Mapping[str, StageConfig]) -> list[str]:
        """Return what `plan` says of this configuration, a line each."""
        return []

    def list_remarks(self, inputs: Mapping[str, StageConfig]) -> list[str]:
        """Return a line for each setting that is valid but that the user may not have meant."""
        return []

    def rate_follows_batch(self) -> bool:
        """Return whether the learning rate is scaled when another batch size is set."""
        return True

    def repeats_with_seed(self) -> bool:
        """Return whether another `seed` makes this run a repetition of the same experiment.

        The seed is then a column of its result rows, and tables take the mean over seeds. `--seeds`
        sets it.
        """
        return False

    def check_resources(self, resources: Resources) -> None:
        """Raise ValueError if this configuration cannot run on these resources."""

    def check_inputs(self, inputs: Mapping[str, StageConfig]) -> None:
        """Raise ValueError if the inputs, configurations by role,
        do not fit together or this run.
        """

    def check_image_counts(self, counts: Mapping[str, int]) -> None:
        """Raise ValueError if the data set has too few images; `counts` are those of its splits.

        Called where the images are counted anyway; a split whose number is not known is left out.
        """

    def estimate_checkpoint_gb(self) -> float:
        """Return the estimated size of a checkpoint; 0 if the stage saves little or nothing."""
        return 0.0

    def estimate_disk_gb(self, inputs: Mapping[str, StageConfig]) -> float:
        """Return the estimated size of the run's folder; `inputs` are configurations by role."""
        # Two checkpoints are kept, and a third exists while it is being written.
        return 3 * self.estimate_checkpoint_gb()

    def estimate_flops(self, inputs: Mapping[str, StageConfig]) -> float | None:
        """Return the floating-point operations of the whole run; None if they are not known."""
        return None

    def concurrent_roles(self) -> frozenset[str]:
        """Return the roles whose runs need only have begun, not ended, before this run starts.

        `StageContext.running` maps those that are not done to their folders.
        """
        return frozenset()


class Resources(BaseModel):
    """What a stage run needs; a cluster profile says how that is spelled on a cluster.

    A failed job is queued again until `max_failures` of its attempts have failed; preemptions do
    not count. A training that makes no step for `hang_minutes` counts as failed, so that has to be
    longer than compilation and the first batch take.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    # Nodes of the job.
    nodes: int = Field(default=1, ge=1)
    # Processes on each node, with one GPU each.
    ranks_per_node: int = Field(default=1, ge=1)
    # Whether the processes need GPUs.
    gpu: bool = True
    # CPUs of each process, unless the cluster profile says how many.
    cpus_per_rank: int = Field(default=8, ge=1)
    # Time limit. A training that takes longer is requeued and resumes.
    hours: float = Field(default=1.0, gt=0)
    # Memory of each node; without it, what the cluster profile says.
    memory_gb: int | None = Field(default=None, ge=1)
    # A failed job is queued again until so many of its attempts have failed.
    max_failures: int = Field(default=3, ge=1)
    # A training without a step for so long counts as failed.
    hang_minutes: float = Field(default=30.0, gt=0)
    _from_command_line: frozenset[str] = PrivateAttr(default=frozenset())

    def mark_from_command_line(self, names: Iterable[str]) -> Resources:
        """Return the same resources; those of `names` now count more than a cluster profile."""
        marked = self.model_copy()
        marked._from_command_line = frozenset(names)
        return marked

    @property
    def names_from_command_line(self) -> frozenset[str]:
        """Names of the resources that the user set with --set."""
        return self._from_command_line

    def overrides_profile(self, name: str) -> bool:
        """Return whether the user set this resource with --set."""
        return name in self._from_command_line

    @property
    def ranks(self) -> int:
        """Number of processes of the run."""
        return self.nodes * self.ranks_per_node

    @property
    def gpus(self) -> int:
        """Number of GPUs of the run: one per rank, or none."""
        return self.ranks if self.gpu else 0

    @property
    def gpu_hours(self) -> float:
        """GPUs times hours: the most the run may cost."""
        return self.gpus * self.hours


@dataclass(frozen=True)
class StageSpec:
    """One kind of stage.

    `needs` maps a role to the stage that may fill it. Alternatives are written `"pretrain|import"`;
    a trailing `?` (`"pretrain?"`) makes the role optional.

    Functions are given as text ("stages.knn:run") and imported where they are called:

    - `entrypoint`: `(context, config) -> StageOutput`, the stage itself.
    - `check`: `(entry, every) -> problems`, checks the outputs of a finished run.
    - `preflight`: `(config, inputs) -> (what was found, bytes the run will write)`, checks the
      files that a run will read and raises ValueError or OSError if one is wrong. `inputs` are the
      configurations of direct and indirect inputs, by role.
    """

    name: str
    config: type[StageConfig]
    entrypoint: str
    needs: Mapping[str, str] = field(default_factory=dict)
    resources: Resources = field(default_factory=Resources)
    rows_writer: str = ROWS_WRITER
    check: str | None = None
    preflight: str | None = None

    def fillers(self, role: str) -> tuple[str, ...]:
        """Names of the stages that may fill a role."""
        return tuple(self.needs[role].rstrip("?").split("|"))

    def optional(self, role: str) -> bool:
        """Whether a run may leave a role unfilled."""
        return self.needs[role].endswith("?")


@dataclass(frozen=True)
class StageRun:
    """One stage with one configuration and its inputs;
    `needs` maps each role to the run id that fills it.
    """

    stage: str
    name: str
    run_id: str
    config: StageConfig
    needs: Mapping[str, str]
    resources: Resources
    entrypoint: str
    rows_writer: str = ROWS_WRITER
    # Its name in the reproduction that it is from, if that is another one. Records and the folder
    # have it, so that a run is the same whichever reproduction asks for it.
    own_name: str = ""
    # Its name in the reproduction, without the seed that `--seeds` adds.
    written_name: str = ""
    # Lines for the user of `plan` and `submit`; not in the run file.
    facts: tuple[str, ...] = ()
    remarks: tuple[str, ...] = ()

    @property
    def key(self) -> str:
        """Name of the run's folder: `<name>-<run_id>`."""
        return f"{self.own_name or self.name}-{self.run_id}"

    @property
    def watched(self) -> set[str]:
        """Ids of the inputs that need only have begun (`StageConfig.concurrent_roles`)."""
        return {self.needs[role] for role in self.config.concurrent_roles() if role in self.needs}

    def run_dir(self, run_root: Path) -> Path:
        """Folder of the run: `<run_root>/<stage>/<name>-<run_id>`."""
        return _join_path(f"{run_root}/{self.stage}/{self.key}")


@cache
def _join_path(text: str) -> Path:
    # A path takes longer to make than to use, and thousands of runs are asked for theirs several
    # times each.
    return Path(text)
