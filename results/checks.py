"""What is wrong with a row, and which of its names no table knows."""

import difflib
import math
from collections.abc import Iterable

from results.schema import ResultRow
from results.vocabulary import load_vocabulary


def check_row(row: ResultRow) -> str | None:
    """Why a row is refused (no number, out of range, wrong unit, empty name), or None."""
    known = load_vocabulary()
    empty = [
        name
        for name in ("run_id", "method", "arch", "stage", "dataset", "metric")
        if not getattr(row, name)
    ]
    if empty:
        return f"{empty[0]} is empty"
    if not math.isfinite(row.value):
        return f"value {row.value} is not a finite number"
    if row.unit not in known.units:
        return f"unknown unit {row.unit!r}{_hint(row.unit, known.units)}"
    wanted = known.metrics.get(row.metric)
    if wanted is not None and row.unit != wanted:
        return f"metric {row.metric!r} has the unit {row.unit!r}, expected {wanted!r}"
    low, high = known.units[row.unit]
    if not low <= row.value <= high:
        return f"value {row.value:g} of {row.metric} is outside {low:g} to {high:g} {row.unit}"
    if row.epochs < 0 or row.seed < 0:
        return f"epochs {row.epochs} and seed {row.seed} may not be negative"
    return None


def find_unknown_names(row: ResultRow) -> list[str]:
    """Names in a row that no table knows; such a row is shown apart."""
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
