"""The command `verify`: check that the files of runs are still what was written."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from pipeline import manifest
from pipeline.files import FormatVersionError
from pipeline.runfile import import_by_name
from pipeline.spec import StageRun
from stages import STAGES


@dataclass
class Verification:
    """Recorded runs and good checkpoints; a line for each problem, left or repaired."""

    recorded: int = 0
    checkpoints: int = 0
    problems: list[str] = field(default_factory=list)
    repaired: list[str] = field(default_factory=list)

    def summary(self, runs: int) -> str:
        """Return one line about the check of that many runs."""
        repaired = f", {len(self.repaired)} repaired" if self.repaired else ""
        return (
            f"{self.recorded} of {runs} runs are recorded, {self.checkpoints} good checkpoints"
            f"{repaired}, {len(self.problems)} problems"
        )


def verify_runs(
    runs: Sequence[StageRun], root: Path, *, every: int = 0, repair: bool = False
) -> Verification:
    """Check outputs and checkpoints, and every `every`-th converted image (none if 0)."""
    # Stages import mugs only inside functions, so that commands which do not need it start fast.
    from mugs.checkpoint.repair import inspect_checkpoints

    found = Verification()
    for run in runs:
        try:
            entry = manifest.read_entry(root, run.run_id)
        except FormatVersionError as error:
            found.problems.append(str(error))
            continue
        if entry is not None:
            found.recorded += 1
            # Other commands compare sizes only, since hashing a data set takes minutes.
            found.problems += manifest.find_problems(entry, hashes=True)
            if every and (check := STAGES[run.stage].check):
                found.problems += import_by_name(check)(entry, every)
        # An entry that exists but cannot be read; without a file the run is simply not done.
        elif (path := manifest.entry_path(root, run.run_id)).exists():
            found.problems.append(f"{path}: not a readable manifest entry")
        # An unfinished run has checkpoints too, so these are checked with or without an entry.
        checkpoints = inspect_checkpoints(run.run_dir(root) / "checkpoints", repair=repair)
        found.checkpoints += checkpoints.good
        found.problems += checkpoints.problems
        found.repaired += checkpoints.repaired
    return found
