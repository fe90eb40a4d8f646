"""From results to the one number of a cell: best setting, mean over seeds."""

from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from statistics import fmean, stdev

from results.collect import separate_conflicts
from results.schema import Result
from results.store import RowsError


@dataclass(frozen=True)
class Cell:
    """Mean over seeds of the best setting. `also_reported`: other settings worth telling, with their means."""

    value: float
    spread: float | None
    setting: str
    results: tuple[Result, ...]
    also_reported: tuple[tuple[str, float], ...] = ()

    @property
    def seeds(self) -> int:
        """Number of seeds."""
        return len(self.results)

    def text(self) -> str:
        """`72.3`, or `72.3 ± 0.1 (n=3)` with several seeds."""
        shown = format_value(self.value)
        return (
            shown
            if self.spread is None
            else f"{shown} ± {format_value(self.spread)} (n={self.seeds})"
        )


def format_value(value: float) -> str:
    """One decimal."""
    return f"{value:.1f}"


def format_difference(value: float) -> str:
    """One decimal with its sign, which zero has none of."""
    shown = f"{value:+.1f}"
    return "0.0" if shown in ("+0.0", "-0.0") else shown


def split_setting(setting: str) -> list[str]:
    """`cls`, `k=20` and `T=0.07` of `cls, k=20, T=0.07`."""
    return [part.strip() for part in setting.split(",")]


def setting_matches(setting: str, pattern: str) -> bool:
    """Whether a part of a setting matches a pattern (`*% of labels`)."""
    return any(fnmatchcase(part, pattern) for part in split_setting(setting))


def choose_best_cell(results: Iterable[Result], also_report: Sequence[str] = ()) -> Cell | None:
    """The cell of results that differ in setting and seed only; None without any.

    Settings that not every seed has are no choice where others have more. Raises RowsError for two results of one
    setting and seed.
    """
    by_setting: dict[str, list[Result]] = defaultdict(list)
    everything = tuple(results)
    _, conflicts = separate_conflicts(everything)
    if conflicts:
        raise RowsError("\n".join(conflicts))
    for result in everything:
        by_setting[result.row.setting].append(result)
    if not by_setting:
        return None
    most = max(len(found) for found in by_setting.values())
    means = {
        s: fmean(r.row.value for r in found)
        for s, found in sorted(by_setting.items())
        if len(found) == most
    }
    chosen = max(means, key=lambda setting: means[setting])
    used = tuple(sorted(by_setting[chosen], key=lambda result: result.row.seed))
    values = [result.row.value for result in used]
    spread = stdev(values) if len(values) > 1 else None
    return Cell(means[chosen], spread, chosen, used, _also_reported(means, chosen, also_report))


def _also_reported(
    means: dict[str, float], chosen: str, patterns: Sequence[str]
) -> tuple[tuple[str, float], ...]:
    """The best of the settings that match each pattern, unless it is the chosen one."""
    found = []
    for pattern in patterns:
        matching = {s: v for s, v in means.items() if setting_matches(s, pattern)}
        best = max(matching, key=lambda setting: matching[setting], default=chosen)
        if best != chosen:
            found.append((best, means[best]))
    return tuple(found)
