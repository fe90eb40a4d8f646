"""From results to the one number of a cell: the best setting, as a mean over seeds."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from operator import attrgetter
from statistics import fmean, stdev

from results.collect import separate_conflicts
from results.runs import group_by
from results.schema import Result
from results.store import RowsError
from results.vocabulary import describe_setting


@dataclass(frozen=True)
class Cell:
    """Mean over seeds of the best setting."""

    value: float
    # Standard deviation over seeds; None for a single one.
    spread: float | None
    setting: str
    # One per seed, by seed.
    results: tuple[Result, ...]
    # Other settings that a footnote reports, with their means.
    also_reported: tuple[tuple[str, float], ...] = ()
    # How many settings the best was chosen from, and the one fixed in advance, with its mean.
    choices: int = 1
    fixed: tuple[str, float] | None = None

    def describe_setting(self, setting: str | None = None) -> str:
        """Return the setting of the cell, or another one of its evaluation, in words."""
        chosen = self.setting if setting is None else setting
        return describe_setting(self.results[0].row.stage, chosen)

    def text(self) -> str:
        """Return `72.3`, or `72.3 ± 0.1 (n=3)` with several seeds."""
        shown = format_value(self.value)
        if self.spread is None:
            return shown
        return f"{shown} ± {format_value(self.spread)} (n={len(self.results)})"


def format_value(value: float) -> str:
    """Return a number with one decimal, as the paper prints it."""
    return f"{value:.1f}"


def format_difference(value: float) -> str:
    """Return a number with one decimal and its sign; zero has no sign."""
    shown = f"{value:+.1f}"
    return "0.0" if shown in ("+0.0", "-0.0") else shown


def setting_matches(setting: str, pattern: str) -> bool:
    """Return whether a part of a setting (`cls, k=20`) matches a pattern such as `k=*`."""
    return any(fnmatchcase(part.strip(), pattern) for part in setting.split(","))


def choose_best_cell(
    results: Iterable[Result], also_report: Sequence[str] = (), fixed: Sequence[str] = ()
) -> Cell:
    """Return the cell of one or more results that differ in setting and seed only.

    `fixed` are patterns of the setting that is fixed in advance; all must match.

    Raises:
        RowsError: two results have the same setting and seed.
    """
    kept, conflicts = separate_conflicts(tuple(results))
    if conflicts:
        raise RowsError("\n".join(conflicts))
    by_setting: dict[str, list[Result]] = group_by(kept, attrgetter("row.setting"))
    # A setting that only some seeds have would win by a lucky seed, so only those with the most
    # seeds can be chosen. Sorting makes the choice between equal means independent of file order.
    most = max(len(found) for found in by_setting.values())
    means = {
        setting: fmean(result.row.value for result in found)
        for setting, found in sorted(by_setting.items())
        if len(found) == most
    }
    best = max(means, key=lambda setting: means[setting])
    used = sorted(by_setting[best], key=lambda result: result.row.seed)
    # stdev divides by n - 1: the seeds are a sample of all seeds.
    spread = stdev(result.row.value for result in used) if most > 1 else None
    return Cell(
        value=means[best],
        spread=spread,
        setting=best,
        results=tuple(used),
        also_reported=_also_reported(means, best, also_report),
        choices=len(means),
        fixed=_find_fixed(means, fixed),
    )


def _find_fixed(means: dict[str, float], patterns: Sequence[str]) -> tuple[str, float] | None:
    """Return the setting fixed in advance; None if no setting, or more than one, is it."""
    found = [
        (setting, mean)
        for setting, mean in means.items()
        if patterns and all(setting_matches(setting, pattern) for pattern in patterns)
    ]
    return found[0] if len(found) == 1 else None


def _also_reported(
    means: dict[str, float], best: str, patterns: Sequence[str]
) -> tuple[tuple[str, float], ...]:
    """Return the best of the settings that match each pattern, unless it is the best of all."""
    found = []
    for pattern in patterns:
        matching = [setting for setting in means if setting_matches(setting, pattern)]
        top = max(matching, key=lambda setting: means[setting], default=best)
        if top != best:
            found.append((top, means[top]))
    return tuple(found)
