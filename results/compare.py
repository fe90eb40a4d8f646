"""Two sets of results, cell by cell of the tables."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from results.cells import Cell, format_difference
from results.formatted import MISSING, FormattedCell, FormattedPart, FormattedRow, FormattedTable
from results.schema import Result
from results.tables import build_table

HEADER = ("Table", "Line", "Column", "Here", "There", "Here - there")


@dataclass(frozen=True)
class Pair:
    """A cell here and there; at least one is not None."""

    table: str
    group: str
    line: str
    column: str
    here: Cell | None
    there: Cell | None

    @property
    def equal(self) -> bool:
        """Whether both are there with the same numbers."""
        both = self.here is not None and self.there is not None
        return both and _numbers(self.here) == _numbers(self.there)


def _numbers(cell: Cell | None) -> tuple[object, ...]:
    return () if cell is None else (cell.value, cell.spread, cell.seeds, cell.setting)


def compare_cells(
    here: Sequence[Result], there: Sequence[Result], tables: Iterable[str]
) -> list[Pair]:
    """Every cell that has a number of ours in either, in the order of the tables, here first."""
    pairs = []
    for name in tables:
        mine, theirs = _cells(name, here), _cells(name, there)
        pairs += [
            Pair(name, *key, mine.get(key), theirs.get(key))
            for key in dict.fromkeys([*mine, *theirs])
        ]
    return pairs


def _cells(name: str, results: Sequence[Result]) -> dict[tuple[str, str, str], Cell]:
    return {
        (own.entry.group, own.line, own.column): own.cell
        for own in build_table(name, results).our_cells()
    }


def format_comparison(pairs: Sequence[Pair]) -> FormattedTable:
    """The comparison as a table, ready for any format."""
    lines = [
        FormattedRow(pair.group, "ours", tuple(FormattedCell(text) for text in _texts(pair)))
        for pair in pairs
    ]
    equal = sum(pair.equal for pair in pairs)
    only = sum(pair.here is None or pair.there is None for pair in pairs)
    summary = f"{len(pairs)} cells: {equal} equal, {len(pairs) - equal - only} different, {only} in one only."
    title = "Two run roots, cell by cell"
    return FormattedTable(
        "against", title, (FormattedPart(title, HEADER, 3, tuple(lines)),), (), (summary,)
    )


def _texts(pair: Pair) -> tuple[str, ...]:
    shown = [cell.text() if cell else MISSING for cell in (pair.here, pair.there)]
    difference = MISSING
    if pair.here and pair.there:
        change = pair.here.value - pair.there.value
        settings = (
            ""
            if pair.here.setting == pair.there.setting
            else f" ({pair.here.setting} / {pair.there.setting})"
        )
        difference = ("equal" if pair.equal else format_difference(change)) + settings
    return pair.table, pair.line, pair.column, *shown, difference
