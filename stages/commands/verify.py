"""Whether the files of runs are what was written."""

from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from mugs.checkpoint.repair import Inspection

from collections.abc import Sequence
from dataclasses import dataclass, field

from pipeline import manifest
from pipeline.manifest import ManifestEntry
from pipeline.runfile import resolve
from pipeline.spec import StageRun
from stages import STAGES


@dataclass
class Verification:
    """Runs that are recorded, good checkpoints, and a line for each problem that is left or was repaired."""

    recorded: int = 0
    checkpoints: int = 0
    wrong: list[str] = field(default_factory=list)
    repaired: list[str] = field(default_factory=list)

    def summary(self, runs: int) -> str:
        """One line about that many runs."""
        mended = f"{len(self.repaired)} repaired, " if self.repaired else ""
        recorded = (
            f"{self.recorded} of {runs} runs are recorded, {self.checkpoints} good checkpoints"
        )
        return f"{recorded}, {mended}{len(self.wrong)} problems"


def verify_runs(
    runs: Sequence[StageRun], root: Path, *, every: int = 0, repair: bool = False
) -> Verification:
    """Check outputs, checkpoints and, unless `every` is 0, every `every`-th converted image."""
    found = Verification()
    for run in runs:
        entry = manifest.read_entry(root, run.run_id)
        if entry is not None:
            found.recorded += 1
            found.wrong += manifest.find_problems(entry, hashes=True) + (
                check_output_contents(run.stage, entry, every) if every else []
            )
        elif (path := manifest.entry_path(root, run.run_id)).exists():
            found.wrong.append(f"{path}: not a readable manifest entry")
        looked = inspect_checkpoints(run.run_dir(root), repair=repair)
        found.checkpoints += looked.good
        found.wrong += looked.problems
        found.repaired += looked.repaired
    return found


def check_output_contents(stage: str, entry: ManifestEntry, every: int) -> list[str]:
    """What the stage of a finished run finds wrong inside its outputs."""
    check = STAGES[stage].check
    return list(resolve(check)(entry, every)) if check else []


def inspect_checkpoints(run_dir: Path, *, repair: bool) -> "Inspection":
    """What is good and what is wrong; with `repair`, put right what can be."""
    from mugs.checkpoint import repair as storage

    return storage.inspect_checkpoints(run_dir / "checkpoints", repair=repair)
