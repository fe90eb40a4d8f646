"""Mean losses of the first epochs of released runs, as their logs give them.

A run of ours is compared with them. Columns of calibration.csv: run (s100, s300, l250), epoch,
total, and the mean of each loss.
"""

import csv
from importlib import resources

Targets = dict[int, dict[str, float]]


def load_calibration_targets(run: str | None) -> Targets:
    """Return epoch -> name of a loss -> its mean in the released run; nothing for None.

    Raises:
        ValueError: there are no targets of this run.
    """
    if run is None:
        return {}
    with (resources.files("mugs.methods") / "calibration.csv").open(encoding="utf-8") as stream:
        lines = [line for line in csv.DictReader(stream) if line.pop("run") == run]
    if not lines:
        raise ValueError(f"no calibration targets of a run {run!r}")
    return {
        int(line.pop("epoch")): {name: float(value) for name, value in line.items()}
        for line in lines
    }
