"""The command `verify`: check that the files of runs are still what was written."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from pipeline import manifest
from pipeline.files import FormatVersionError
from pipeline.ownership import find_foreign_owner
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


def find_foreign_part(folder: Path) -> str:
    """Return what of a run's folder of checkpoints is not ours; "" if all is.

    A link of another user could lead to any folder of ours.
    """
    stage_folder = folder.parent.parent
    for path in (stage_folder, folder.parent, folder):
        owner = find_foreign_owner(path)
        # The folder of a stage belongs to whoever came first.
        if owner and (path != stage_folder or path.is_symlink()):
            return f"{path}: belongs to {owner}"
    return ""


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
        folder = run.run_dir(root) / "checkpoints"
        foreign = find_foreign_part(folder) if repair else ""
        checkpoints = inspect_checkpoints(folder, repair=repair and not foreign)
        if foreign and checkpoints.problems:
            found.problems.append(f"{foreign}, so nothing of run {run.name} is repaired")
        found.checkpoints += checkpoints.good
        found.problems += checkpoints.problems
        found.repaired += checkpoints.repaired
    return found
