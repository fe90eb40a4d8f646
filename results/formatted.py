"""A table as rows of text with footnotes: what every output format prints."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

from results.cells import Cell, format_difference, format_value
from results.margins import Margin
from results.tables import Block, Entry, OurRow, Table
from results.verdict import describe_method, describe_selection, describe_verdict

MISSING = "--"
Kind = Literal["paper", "ours", "difference", "verdict"]


@dataclass(frozen=True)
class FormattedCell:
    """The text of a cell, and the numbers of its footnotes."""

    text: str
    marks: tuple[int, ...] = ()


@dataclass(frozen=True)
class FormattedRow:
    """A row of a table; the first cells are its labels."""

    group: str
    kind: Kind
    cells: tuple[FormattedCell, ...]


@dataclass(frozen=True)
class FormattedPart:
    """Rows under one header; the first `labels` columns are labels, the others numbers."""

    title: str
    header: tuple[str, ...]
    labels: int
    rows: tuple[FormattedRow, ...]


# Numbers of notes by their texts, counted from 1; equal texts share a number.
Footnotes = dict[str, int]


@dataclass(frozen=True)
class FormattedTable:
    """A table ready to print: its parts, numbered footnotes, and general notes."""

    name: str
    title: str
    parts: tuple[FormattedPart, ...]
    footnotes: tuple[str, ...]
    notes: tuple[str, ...]


def format_table(table: Table, margin: float | None = None) -> FormattedTable:
    """Return the rows and footnotes of a table; with a margin, also verdicts and their method."""
    # All parts share the numbering, so they are formatted in the order in which they are printed.
    footnotes: Footnotes = {}
    parts = [_format_block(table.printed, footnotes, margin)]
    if table.unmatched.entries:
        parts.append(_format_block(table.unmatched, footnotes))
    if table.margins:
        parts.append(_format_margins(table.margins, table.printed.columns, footnotes))
    notes = table.notes
    # Beside a table without a verdict, the method would seem to be about its numbers.
    if margin is not None and table.count_comparisons():
        notes = (*notes, *describe_method(margin))
    return FormattedTable(table.name, table.title, tuple(parts), tuple(footnotes), notes)


def _mark(footnotes: Footnotes, text: str) -> tuple[int]:
    """Return the number of a note, which is added if it is new."""
    return (footnotes.setdefault(text, len(footnotes) + 1),)


def _format_block(block: Block, footnotes: Footnotes, margin: float | None = None) -> FormattedPart:
    rows = [
        row
        for entry in block.entries
        for row in _format_entry(entry, block.columns, footnotes, margin)
    ]
    # The paper prints effective epochs; our own rows have the epochs that were really trained.
    epochs = "Epochs" if block.entries and block.entries[0].printed else "Real epochs"
    header = ("Method", "Arch", epochs, *block.columns.values())
    return FormattedPart(block.title, header, 3, tuple(rows))


def _format_entry(
    entry: Entry, columns: Mapping[str, str], footnotes: Footnotes, margin: float | None
) -> list[FormattedRow]:
    """Return the printed row, our rows, and below each the difference from the printed one.

    With a margin, the verdict follows the difference.
    """
    rows = []
    if entry.printed:
        rows.append(_paper_row(entry, columns, footnotes))
    if not entry.comparable:
        return rows
    # An empty row of ours shows that a number is still missing.
    for ours in entry.ours or (OurRow("ours", {}),):
        rows.append(_our_row(entry, ours, columns, footnotes))
        if any(key in entry.paper for key in ours.cells):
            rows.append(_difference_row(entry, ours, columns))
            if margin is not None:
                rows.append(_verdict_row(entry, ours, columns, margin, footnotes))
    return rows


def _paper_row(entry: Entry, columns: Mapping[str, str], footnotes: Footnotes) -> FormattedRow:
    marks = _mark_notes(entry, columns, footnotes)
    texts = {key: format_value(value) for key, value in entry.paper.items()}
    cells = [FormattedCell(texts.get(key, MISSING), marks.get(key, ())) for key in columns]
    return FormattedRow(entry.group, "paper", (*_labels(entry, entry.method), *cells))


def _our_row(
    entry: Entry, ours: OurRow, columns: Mapping[str, str], footnotes: Footnotes
) -> FormattedRow:
    # In a block of our own rows "ours" is understood; only a further label is worth showing.
    alone = not entry.printed and ours.label == "ours"
    method = entry.method if alone else f"{entry.method}, {ours.label}"
    cells = [
        _our_cell(ours.cells.get(key), f"{title}, {entry.words()}", footnotes)
        for key, title in columns.items()
    ]
    return FormattedRow(entry.group, "ours", (*_labels(entry, method), *cells))


def _difference_row(entry: Entry, ours: OurRow, columns: Mapping[str, str]) -> FormattedRow:
    differences = {
        key: ours.cells[key].value - entry.paper[key] for key in ours.cells if key in entry.paper
    }
    texts = [_difference_or_missing(differences.get(key)) for key in columns]
    labels = ("difference", "", "")
    return FormattedRow(entry.group, "difference", tuple(map(FormattedCell, [*labels, *texts])))


def _verdict_row(
    entry: Entry, ours: OurRow, columns: Mapping[str, str], margin: float, footnotes: Footnotes
) -> FormattedRow:
    """Return the verdicts of a row; a note says what was selected on the evaluated images."""
    cells = [FormattedCell("verdict"), FormattedCell(""), FormattedCell("")]
    for key, title in columns.items():
        cell = ours.cells.get(key)
        if cell is None or key not in entry.paper:
            cells.append(FormattedCell(MISSING))
            continue
        selection = describe_selection(cell)
        what = f"{title}, {entry.words()}, {ours.label}"
        marks = _mark(footnotes, f"{what}: {selection}") if selection else ()
        cells.append(FormattedCell(describe_verdict(cell, entry.paper[key], margin), marks))
    return FormattedRow(entry.group, "verdict", tuple(cells))


def _mark_notes(
    entry: Entry, columns: Mapping[str, str], footnotes: Footnotes
) -> dict[str, tuple[int]]:
    """Return the footnote number of each column with a note; the same note has one number."""
    marks: dict[str, tuple[int]] = {}
    for note in dict.fromkeys(entry.notes.values()):
        keys = [key for key in columns if entry.notes.get(key) == note]
        titles = ", ".join(columns[key] for key in keys)
        marks |= dict.fromkeys(keys, _mark(footnotes, f"{titles}, {entry.words()}: {note}"))
    return marks


def _labels(entry: Entry, method: str) -> tuple[FormattedCell, ...]:
    return (
        FormattedCell(method),
        FormattedCell(entry.arch),
        FormattedCell(entry.epochs or MISSING),
    )


def _our_cell(cell: Cell | None, what: str, footnotes: Footnotes) -> FormattedCell:
    if cell is None:
        return FormattedCell(MISSING)
    return FormattedCell(cell.text(), _mark(footnotes, f"{what}: {describe_source(cell)}"))


def describe_source(cell: Cell) -> str:
    """Return where a cell comes from: runs, setting, other settings, deviations from the recipe."""
    rows = [result.row for result in cell.results]
    seeds = [f"{row.run_id} (seed {row.seed}: {format_value(row.value)})" for row in rows]
    text = f"run {rows[0].run_id}" if len(rows) == 1 else f"runs {', '.join(seeds)}"
    # The setting is empty if an evaluation has only one.
    if cell.setting:
        text += f"; {cell.describe_setting()}"
    for setting, value in cell.also_reported:
        text += f"; {cell.describe_setting(setting)}: {format_value(value)}"
    if other_code := [result.row.run_id for result in cell.results if result.mixed_code]:
        text += f"; more than one version of the code: {', '.join(other_code)}"
    if differs := cell.results[0].differs:
        text += f"; differs: {', '.join(differs)}"
    return text


def _format_margins(
    margins: Sequence[Margin], columns: Mapping[str, str], footnotes: Footnotes
) -> FormattedPart:
    """Return the leads: as the text prints them, from the paper's table, and with our result."""
    rows = []
    for margin in margins:
        column = columns[margin.column]
        conflict = "" if margin.consistent else "text and table disagree"
        note = "; ".join(filter(None, (conflict, margin.note)))
        marks = _mark(footnotes, f"{column}, {margin.claim}: {note}") if note else ()
        cells = (
            FormattedCell(margin.claim),
            FormattedCell(column),
            FormattedCell(_difference_or_missing(margin.printed), marks),
            FormattedCell(_difference_or_missing(margin.computed)),
            FormattedCell(_difference_or_missing(margin.ours)),
        )
        rows.append(FormattedRow("", "paper", cells))
    header = (
        "Lead, in points",
        "Column",
        "Printed in the text",
        "From the table",
        "Ours over theirs",
    )
    return FormattedPart("Leads", header, 2, tuple(rows))


def _difference_or_missing(value: float | None) -> str:
    return MISSING if value is None else format_difference(value)
