"""What a stage is given, and what it returns."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pipeline.control import Control

if TYPE_CHECKING:
    from pipeline.manifest import ManifestEntry


@dataclass(frozen=True)
class StageContext:
    """What a stage is given besides its configuration.

    `inputs` maps each role to the run that fills it. `running` maps the roles of
    `StageConfig.concurrent_roles` whose runs are not done yet to their folders. A stage that trains
    step by step passes `control` to its loop; it is None outside a job.
    """

    stage: str
    name: str
    run_id: str
    run_dir: Path
    inputs: Mapping[str, ManifestEntry]
    attempt: int
    control: Control | None = None
    running: Mapping[str, Path] = field(default_factory=dict)


@dataclass
class StageOutput:
    """What a stage returns.

    `outputs` maps a label to a file or folder, relative to the run's folder or absolute inside it.
    `checksums` gives the SHA-256 of outputs that the stage computed itself: reading hundreds of GB
    once more takes minutes. `rows` are the result rows. `info` holds JSON-able facts for later
    stages (number of classes, architecture). Only what rank 0 returns is recorded.
    """

    outputs: Mapping[str, Path] = field(default_factory=dict)
    rows: Sequence[Any] = ()
    info: Mapping[str, Any] = field(default_factory=dict)
    checksums: Mapping[str, str] = field(default_factory=dict)
