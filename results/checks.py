"""Checks of a result row: is it plausible, and does a table know its names?"""

import difflib
import math
from collections.abc import Iterable

from results.schema import ResultRow
from results.vocabulary import load_vocabulary

REQUIRED = ("run_id", "method", "arch", "stage", "dataset", "metric")


def check_row(row: ResultRow) -> None:
    """Raise ValueError if a name is missing, or if the value or its unit cannot be right."""
    # `setting` may be empty: an evaluation can have only one.
    known = load_vocabulary()
    for name in REQUIRED:
        if not getattr(row, name):
            raise ValueError(f"{name} is empty")
    if not math.isfinite(row.value):
        raise ValueError(f"value {row.value} is not a finite number")
    if row.unit not in known.units:
        raise ValueError(f"unknown unit {row.unit!r}{_hint(row.unit, known.units)}")
    # A metric that no table knows may have any unit; such a row is listed, not refused.
    expected = known.metrics.get(row.metric)
    if expected is not None and row.unit != expected:
        raise ValueError(f"metric {row.metric!r} has the unit {row.unit!r}, expected {expected!r}")
    low, high = known.units[row.unit]
    if not low <= row.value <= high:
        # The usual cause is a fraction that was written as percent, or the reverse.
        raise ValueError(
            f"value {row.value:g} of {row.metric} is outside {low:g} to {high:g} {row.unit}"
        )
    if row.epochs < 0 or row.seed < 0:
        raise ValueError(f"epochs {row.epochs} and seed {row.seed} may not be negative")


def find_unknown_names(row: ResultRow) -> list[str]:
    """Return the names in a row that no table knows, with the closest known name of each."""
    known = load_vocabulary()
    found = []
    if not known.knows_dataset(row.dataset):
        found.append(f"data set {row.dataset!r}{_hint(row.dataset, known.datasets)}")
    if row.stage not in known.stages:
        found.append(f"stage {row.stage!r}{_hint(row.stage, known.stages)}")
    if row.metric not in known.metrics:
        found.append(f"metric {row.metric!r}{_hint(row.metric, known.metrics)}")
    return found


def _hint(name: str, known: Iterable[str]) -> str:
    names = sorted(known)
    guess = difflib.get_close_matches(name, names, n=1)
    return (f"; did you mean {guess[0]!r}?" if guess else "") + f" (known: {', '.join(names)})"
