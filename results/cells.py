"""From rows to the one number of a cell: best setting, mean over seeds."""

from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass
from statistics import mean, stdev

from results.schema import ResultRow


class CellError(ValueError):
    """Two rows claim one cell; the message names both."""


@dataclass(frozen=True)
class Cell:
    """Mean over seeds of the best setting, its spread, and what was chosen."""

    value: float
    spread: float | None
    setting: str
    others: tuple[tuple[str, float], ...]

    def text(self) -> str:
        """`72.3`, or `72.3 ± 0.1` with several seeds."""
        return f"{self.value:.1f}" if self.spread is None else f"{self.value:.1f} ± {self.spread:.1f}"


def best_cell(rows: Iterable[ResultRow]) -> Cell | None:
    """The cell of rows that differ in setting and seed only. Raises CellError for two rows of one setting and seed."""
    by_setting: dict[str, dict[int, ResultRow]] = defaultdict(dict)
    for row in rows:
        other = by_setting[row.setting].setdefault(row.seed, row)
        if other is not row:
            raise CellError(
                f"two rows for one cell: runs {other.run_id} ({other.value}) and {row.run_id} ({row.value}), both "
                f"{row.method} {row.arch} {row.epochs} epochs, {row.stage} on {row.dataset}, "
                f"{row.setting!r}, seed {row.seed}"
            )
    if not by_setting:
        return None
    values = {s: [row.value for row in seeds.values()] for s, seeds in by_setting.items()}
    chosen = max(values, key=lambda s: mean(values[s]))
    spread = stdev(values[chosen]) if len(values[chosen]) > 1 else None
    others = tuple((s, mean(v)) for s, v in values.items() if s != chosen)
    return Cell(mean(values[chosen]), spread, chosen, others)
