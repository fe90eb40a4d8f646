"""Compare two sets of results, cell by cell of the tables."""

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from types import MappingProxyType

from results.cells import Cell, format_difference
from results.formatted import (
    MISSING,
    FormattedCell,
    FormattedPart,
    FormattedRow,
    FormattedTable,
)
from results.runs import FinishedRun
from results.schema import Result
from results.tables import build_table
from results.verdict import describe_comparison, describe_comparison_method

HEADER = ("Table", "Line", "Column", "Here", "There", "Here - there")

# Beside a verdict, or instead of an undecided one: a run says nothing of another run.
SAME_RUN = "same run"
CHANGED_RUN = "same run: one side was changed"

# The runs of a side by id.
Runs = Mapping[str, FinishedRun]
NO_RUNS: Runs = MappingProxyType({})


def compare_cells(
    here: Sequence[Result],
    there: Sequence[Result],
    tables: Iterable[str],
    margin: float | None = None,
    runs: tuple[Runs, Runs] = (NO_RUNS, NO_RUNS),
) -> FormattedTable:
    """Return every cell that has a result of ours on either side, in the order of the tables.

    With a margin, a last column says whether the number here reproduces the one there. `runs` are
    those of both sides: without them, a run that was changed is taken for one that was repeated.
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
                texts.append(_describe_verdict(mine.get(key), theirs.get(key), margin, runs))
            rows.append(FormattedRow(group, "ours", tuple(map(FormattedCell, texts))))
    summary = (
        f"{len(rows)} cells: {counts['equal']} equal, {counts['different']} different,"
        f" {counts['single']} in one only."
    )
    title = "Two run roots, cell by cell"
    header = HEADER if margin is None else (*HEADER, "Verdict")
    notes = [summary]
    if margin is not None:
        notes += [*describe_comparison_method(margin), *_describe_same_runs(rows)]
    part = FormattedPart(title, header, 3, tuple(rows))
    return FormattedTable("against", title, (part,), (), tuple(notes))


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


def _describe_verdict(
    here: Cell | None, there: Cell | None, margin: float, runs: tuple[Runs, Runs]
) -> str:
    if here is None or there is None:
        return MISSING
    verdict = describe_comparison(here, there, margin)
    if _run_ids(here) != _run_ids(there):
        return verdict
    if _numbers(here) == _numbers(there):
        # However few the images are, there is nothing to decide.
        return (
            f"{SAME_RUN}, equal" if verdict.startswith("undecided") else f"{verdict} ({SAME_RUN})"
        )
    if all(_is_one_execution(run_id, runs) for run_id in _run_ids(here)):
        return f"{verdict} ({CHANGED_RUN})"
    # Repeated on another kind of machine, a run has the same id and may have another number.
    return verdict


def _is_one_execution(run_id: str, runs: tuple[Runs, Runs]) -> bool:
    """Return whether both sides recorded the same execution of a run, and no repetition."""
    here, there = (side.get(run_id) for side in runs)
    if here is None or there is None or not here.finished:
        return False
    return (here.finished, here.seconds) == (there.finished, there.seconds)


def _describe_same_runs(rows: Sequence[FormattedRow]) -> list[str]:
    """Return a line about runs that are on both sides, if a verdict is about one."""
    if not any(SAME_RUN in row.cells[-1].text for row in rows):
        return []
    return [
        "Same run: settings, data and seed are the same on both sides (a copy, or repeated), which"
        " says nothing of another run or seed."
    ]


def _run_ids(cell: Cell) -> list[str]:
    return [result.row.run_id for result in cell.results]


def _numbers(cell: Cell) -> tuple[object, ...]:
    return cell.value, cell.spread, len(cell.results), cell.setting
