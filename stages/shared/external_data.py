"""Data sets that stay in place: one stage checks them, later stages read them from there."""

import json
from collections.abc import Callable, Mapping
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

from pydantic import PositiveInt

from pipeline.files import expand_home
from pipeline.inputs import check_unchanged
from pipeline.settings import RequiredAtRun, Runtime
from pipeline.spec import Label, StageConfig
from pipeline.stage import StageContext

Report = Callable[[int, int], None]
"""Told (done, total) while files are checked."""


@dataclass(frozen=True, kw_only=True)
class ExternalDataConfig(StageConfig):
    """Base of the data sets that are read where they are; their location is not in the run id."""

    # What the built-in data set and its output are called: "scenes" or "videos".
    kind: ClassVar[str]
    one_rank: ClassVar[bool] = True

    # Name in result rows and tables.
    dataset: Label
    data_dir: RequiredAtRun[str | None] = None
    threads: Runtime[PositiveInt] = 8

    def check_files(self, root: Path, report: Report) -> dict[str, int]:
        """Return how many there are of what; raise SourceError if a file is missing or wrong."""
        raise NotImplementedError

    def write_builtin(self, root: Path) -> None:
        """Write the built-in data set, made of the digits of scikit-learn."""
        raise NotImplementedError

    def find_root(self) -> Path | None:
        """Return the user's folder; None for "builtin:digit_<kind>", which each run writes."""
        if self.data_dir is None:
            raise ValueError("data_dir is not set")
        if self.data_dir == f"builtin:digit_{self.kind}":
            return None
        return expand_home(self.data_dir).absolute()


def check_external_data(
    cfg: ExternalDataConfig, inputs: Mapping[str, StageConfig]
) -> tuple[str, float]:
    """Return what is there, in words, and that 0 bytes will be written.

    Raises:
        SourceError: a file is missing or wrong, as in a run.
    """
    root = cfg.find_root()
    if root is None:
        return f"{cfg.kind} of the digits that come with scikit-learn", 0.0
    counts = cfg.check_files(root, lambda done, total: None)
    return ", ".join(f"{count:,} {what}" for what, count in counts.items()), 0.0


def register_external_data(
    ctx: StageContext, cfg: ExternalDataConfig
) -> tuple[dict[str, Path], dict[str, int]]:
    """Check a data set; return the outputs and counts of its run.

    Output `layout` says where the data set is. A built-in one is written and is an output too.

    Raises:
        SourceError: a file is missing or wrong.
    """
    from mugs.engine.progress import Progress
    from pipeline.files import write_atomic

    outputs = {"layout": ctx.run_dir / "layout.json"}
    root = cfg.find_root()
    if root is None:
        root = outputs[cfg.kind] = ctx.run_dir / cfg.kind
        cfg.write_builtin(root)
    progress = Progress("check", 1, unit=cfg.kind, path=ctx.run_dir / "progress.json")

    def report(done: int, total: int) -> None:
        # The total is known only once the folders have been listed.
        progress.total = total
        progress.update(done)

    with closing(progress):
        counts = cfg.check_files(root, report)
    write_atomic(outputs["layout"], json.dumps({"root": str(root)}, indent=1))
    return outputs, counts


def read_data_root(ctx: StageContext) -> Path:
    """Return the folder of the data set that fills the role `data`.

    Raises:
        InputChangedError: it does not hold any more what that run checked.
    """
    entry = ctx.inputs["data"]
    check_unchanged(
        entry.provenance.get("inputs", {}),
        f"{entry.name} checked it as it was; check it again in a run with another dataset name",
    )
    return Path(json.loads(entry.output("layout").read_text(encoding="utf-8"))["root"])
