"""A table as lines of text with footnotes: what every format prints."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal

from results.cells import Cell, format_difference, format_value
from results.margins import Margin
from results.tables import Block, Entry, OurRow, Table

MISSING = "--"
Kind = Literal["paper", "ours", "difference"]


@dataclass(frozen=True)
class FormattedCell:
    """A cell: what it says, the numbers of its footnotes, and the ids of the runs behind it."""

    text: str
    marks: tuple[int, ...] = ()
    run_ids: tuple[str, ...] = ()


@dataclass(frozen=True)
class FormattedRow:
    """A line of a table; the first cells are its labels."""

    group: str
    kind: Kind
    cells: tuple[FormattedCell, ...]


@dataclass(frozen=True)
class FormattedPart:
    """Lines under one heading row."""

    title: str
    header: tuple[str, ...]
    labels: int
    lines: tuple[FormattedRow, ...]


@dataclass
class Footnotes:
    """Numbered notes; the same text has one number."""

    texts: list[str] = field(default_factory=list)

    def mark(self, text: str) -> int:
        """Number of a note."""
        if text not in self.texts:
            self.texts.append(text)
        return self.texts.index(text) + 1


@dataclass(frozen=True)
class FormattedTable:
    """A table ready to print: its parts, numbered footnotes, general notes."""

    name: str
    title: str
    parts: tuple[FormattedPart, ...]
    footnotes: tuple[str, ...]
    notes: tuple[str, ...]


def format_table(table: Table) -> FormattedTable:
    """The lines and footnotes of a table."""
    footnotes = Footnotes()
    parts = [_part(table.printed, footnotes, table.title)]
    if table.unmatched.entries:
        parts.append(_part(table.unmatched, footnotes, table.unmatched.title))
    if table.margins:
        parts.append(_margins(table.margins, table.printed.columns, footnotes))
    return FormattedTable(
        table.name, table.title, tuple(parts), tuple(footnotes.texts), table.notes
    )


def _part(block: Block, footnotes: Footnotes, title: str) -> FormattedPart:
    lines = [line for entry in block.entries for line in _lines(entry, block.columns, footnotes)]
    epochs = "Epochs" if block.entries and block.entries[0].printed else "Real epochs"
    return FormattedPart(
        title, ("Method", "Arch", epochs, *block.columns.values()), 3, tuple(lines)
    )


def _lines(entry: Entry, columns: dict[str, str], footnotes: Footnotes) -> list[FormattedRow]:
    found = []
    if entry.printed:
        notes = _noted(entry, columns, footnotes)
        cells = [
            FormattedCell(
                format_value(entry.paper[key]) if key in entry.paper else MISSING,
                _one(notes.get(key)),
            )
            for key in columns
        ]
        found.append(FormattedRow(entry.group, "paper", (*_labels(entry, entry.method), *cells)))
    if not entry.comparable:
        return found
    for ours in entry.ours or (OurRow("ours", {}),):
        alone = not entry.printed and ours.label == "ours"
        label = entry.method if alone else f"{entry.method}, {ours.label}"
        cells = [
            _our_cell(ours.cells.get(key), f"{title}, {entry.words()}", footnotes)
            for key, title in columns.items()
        ]
        found.append(FormattedRow(entry.group, "ours", (*_labels(entry, label), *cells)))
        if any(key in entry.paper for key in ours.cells):
            cells = [_difference(ours.cells.get(key), entry.paper.get(key)) for key in columns]
            found.append(
                FormattedRow(
                    entry.group,
                    "difference",
                    (FormattedCell("difference"), FormattedCell(""), FormattedCell(""), *cells),
                )
            )
    return found


def _noted(entry: Entry, columns: dict[str, str], footnotes: Footnotes) -> dict[str, int]:
    """Number of the note of each column that has one; columns of the same note share it."""
    marks: dict[str, int] = {}
    for note in dict.fromkeys(entry.notes.values()):
        keys = [key for key in columns if entry.notes.get(key) == note]
        mark = footnotes.mark(f"{', '.join(columns[key] for key in keys)}, {entry.words()}: {note}")
        marks |= dict.fromkeys(keys, mark)
    return marks


def _labels(entry: Entry, method: str) -> tuple[FormattedCell, ...]:
    return FormattedCell(method), FormattedCell(entry.arch), FormattedCell(entry.epochs or MISSING)


def _one(mark: int | None) -> tuple[int, ...]:
    return () if mark is None else (mark,)


def _our_cell(cell: Cell | None, what: str, footnotes: Footnotes) -> FormattedCell:
    if cell is None:
        return FormattedCell(MISSING)
    ids = tuple(result.row.run_id for result in cell.results)
    return FormattedCell(cell.text(), (footnotes.mark(f"{what}: {describe_source(cell)}"),), ids)


def describe_source(cell: Cell) -> str:
    """Where a cell comes from: runs, setting, other settings, what differs from the recipe."""
    if len(cell.results) == 1:
        text = f"run {cell.results[0].row.run_id}"
    else:
        each = (
            f"{r.row.run_id} (seed {r.row.seed}: {format_value(r.row.value)})" for r in cell.results
        )
        text = f"runs {', '.join(each)}"
    text += f"; {cell.setting}" if cell.setting else ""
    text += "".join(f"; {setting}: {format_value(value)}" for setting, value in cell.also_reported)
    differs = cell.results[0].differs
    return text + (f"; differs: {', '.join(differs)}" if differs else "")


def _difference(cell: Cell | None, paper: float | None) -> FormattedCell:
    return FormattedCell(
        MISSING if cell is None or paper is None else format_difference(cell.value - paper)
    )


def _margins(
    margins: Sequence[Margin], columns: dict[str, str], footnotes: Footnotes
) -> FormattedPart:
    """Leads: as the text prints them, from the paper's table, and of ours over the other's printed number."""
    lines = []
    for margin in margins:
        marks = []
        if not margin.consistent or margin.note:
            disagree = "" if margin.consistent else "text and table disagree"
            note = "; ".join(part for part in (disagree, margin.note) if part)
            marks.append(footnotes.mark(f"{columns[margin.column]}, {margin.claim}: {note}"))
        printed = FormattedCell(
            MISSING if margin.printed is None else format_difference(margin.printed), tuple(marks)
        )
        ours = FormattedCell(MISSING if margin.ours is None else format_difference(margin.ours))
        cells = (
            FormattedCell(margin.claim),
            FormattedCell(columns[margin.column]),
            printed,
            FormattedCell(format_difference(margin.computed)),
            ours,
        )
        lines.append(FormattedRow("", "paper", cells))
    header = (
        "Lead, in points",
        "Column",
        "Printed in the text",
        "From the table",
        "Ours over theirs",
    )
    return FormattedPart("Leads", header, 2, tuple(lines))
