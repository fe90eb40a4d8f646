"""Compare two sets of results, cell by cell of the tables."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from results.cells import Cell, format_difference
from results.formatted import (
    MISSING,
    FormattedCell,
    FormattedPart,
    FormattedRow,
    FormattedTable,
)
from results.schema import Result
from results.tables import build_table

HEADER = ("Table", "Line", "Column", "Here", "There", "Here - there")


@dataclass(frozen=True)
class CellPair:
    """A cell here and there; one of them may be missing."""

    table: str
    group: str
    row: str
    column: str
    here: Cell | None
    there: Cell | None

    @property
    def equal(self) -> bool:
        """Whether both exist and have the same numbers."""
        if self.here is None or self.there is None:
            return False
        return _numbers(self.here) == _numbers(self.there)


def _numbers(cell: Cell) -> tuple[object, ...]:
    # Unrounded, and with the chosen setting: equal to one decimal by another k is not equal.
    return cell.value, cell.spread, cell.seeds, cell.setting


def compare_cells(
    here: Sequence[Result], there: Sequence[Result], tables: Iterable[str]
) -> list[CellPair]:
    """Return every cell that has a result of ours on either side, in the order of the tables."""
    pairs = []
    for name in tables:
        mine = _cells(name, here)
        theirs = _cells(name, there)
        # A dict keeps the order and drops repeated keys: the cells here first, then those only
        # there.
        keys = dict.fromkeys([*mine, *theirs])
        pairs += [CellPair(name, *key, mine.get(key), theirs.get(key)) for key in keys]
    return pairs


def _cells(name: str, results: Sequence[Result]) -> dict[tuple[str, str, str], Cell]:
    return {
        (ours.entry.group, ours.row, ours.column): ours.cell
        for ours in build_table(name, results).our_cells()
    }


def format_comparison(pairs: Sequence[CellPair]) -> FormattedTable:
    """Return the comparison as a table, ready for any format."""
    rows = [
        FormattedRow(pair.group, "ours", tuple(map(FormattedCell, _texts(pair)))) for pair in pairs
    ]
    equal = sum(pair.equal for pair in pairs)
    single = sum(pair.here is None or pair.there is None for pair in pairs)
    different = len(pairs) - equal - single
    summary = f"{len(pairs)} cells: {equal} equal, {different} different, {single} in one only."
    title = "Two run roots, cell by cell"
    part = FormattedPart(title, HEADER, 3, tuple(rows))
    return FormattedTable("against", title, (part,), (), (summary,))


def _texts(pair: CellPair) -> tuple[str, ...]:
    shown = [cell.text() if cell else MISSING for cell in (pair.here, pair.there)]
    difference = MISSING
    if pair.here and pair.there:
        change = pair.here.value - pair.there.value
        difference = "equal" if pair.equal else format_difference(change)
        if pair.here.setting != pair.there.setting:
            difference += f" ({pair.here.setting} / {pair.there.setting})"
    return pair.table, pair.row, pair.column, *shown, difference
