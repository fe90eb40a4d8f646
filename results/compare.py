"""Compare two sets of results, cell by cell of the tables."""

from collections import Counter
from collections.abc import Iterable, Sequence

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
from results.verdict import describe_comparison, describe_comparison_method

HEADER = ("Table", "Line", "Column", "Here", "There", "Here - there")


def compare_cells(
    here: Sequence[Result],
    there: Sequence[Result],
    tables: Iterable[str],
    margin: float | None = None,
) -> FormattedTable:
    """Return every cell that has a result of ours on either side, in the order of the tables.

    With a margin, a last column says whether the number here reproduces the one there.
    """
    rows = []
    counts: Counter[str] = Counter()
    for name in tables:
        mine = _cells(name, here)
        theirs = _cells(name, there)
        # A dict keeps the order and drops repeated keys: the cells here first, then those only
        # there.
        for key in dict.fromkeys([*mine, *theirs]):
            group, *labels = key
            shown = [cells[key].text() if key in cells else MISSING for cells in (mine, theirs)]
            state, difference = _compare(mine.get(key), theirs.get(key))
            counts[state] += 1
            texts = [name, *labels, *shown, difference]
            if margin is not None:
                texts.append(_describe_verdict(mine.get(key), theirs.get(key), margin))
            rows.append(FormattedRow(group, "ours", tuple(map(FormattedCell, texts))))
    summary = (
        f"{len(rows)} cells: {counts['equal']} equal, {counts['different']} different,"
        f" {counts['single']} in one only."
    )
    title = "Two run roots, cell by cell"
    header = HEADER if margin is None else (*HEADER, "Verdict")
    notes = (summary,) if margin is None else (summary, *describe_comparison_method(margin))
    part = FormattedPart(title, header, 3, tuple(rows))
    return FormattedTable("against", title, (part,), (), notes)


def _cells(name: str, results: Sequence[Result]) -> dict[tuple[str, str, str], Cell]:
    return {
        (ours.entry.group, ours.row, ours.column): ours.cell
        for ours in build_table(name, results).our_cells()
    }


def _compare(here: Cell | None, there: Cell | None) -> tuple[str, str]:
    """Return whether two cells are equal, different or a single one, and the text that shows it."""
    if here is None or there is None:
        return "single", MISSING
    # Unrounded, and with the chosen setting: equal to one decimal by another k is not equal.
    if _numbers(here) == _numbers(there):
        return "equal", "equal"
    difference = format_difference(here.value - there.value)
    if here.setting != there.setting:
        difference += f" ({here.describe_setting()} / {there.describe_setting()})"
    return "different", difference


def _describe_verdict(here: Cell | None, there: Cell | None, margin: float) -> str:
    if here is None or there is None:
        return MISSING
    verdict = describe_comparison(here, there, margin)
    # One run gave the same numbers twice: however few the images, there is nothing to decide.
    same = _run_ids(here) == _run_ids(there) and _numbers(here) == _numbers(there)
    return "same run, equal" if same and verdict.startswith("undecided") else verdict


def _run_ids(cell: Cell) -> list[str]:
    return [result.row.run_id for result in cell.results]


def _numbers(cell: Cell) -> tuple[object, ...]:
    return cell.value, cell.spread, len(cell.results), cell.setting
