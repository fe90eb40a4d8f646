"""Tables as Markdown, LaTeX (booktabs) and CSV.

The same table gives the same bytes in any locale, time zone and hash seed.
"""

import re
from collections.abc import Iterator, Sequence
from itertools import groupby
from operator import attrgetter
from pathlib import Path
from typing import Literal

from pipeline.files import write_atomic
from results.formatted import (
    FormattedCell,
    FormattedPart,
    FormattedRow,
    FormattedTable,
    format_table,
)
from results.tables import Block, Entry, Table

Format = Literal["md", "latex", "csv"]
SUFFIX: dict[Format, str] = {"md": "md", "latex": "tex", "csv": "csv"}


def write_tables(tables: Sequence[Table], out_dir: Path) -> dict[str, Path]:
    """Write tables in all three formats; return the paths by file name."""
    written = {}
    for table in tables:
        for fmt, suffix in SUFFIX.items():
            name = f"{table.name}.{suffix}"
            written[name] = write_atomic(out_dir / name, render_table(table, fmt))
    return written


def render_table(table: Table, fmt: Format) -> str:
    """Return a table as text."""
    # The CSV has unrounded numbers and no footnotes, so it is made from the table itself.
    return render_csv(table) if fmt == "csv" else render_formatted(format_table(table), fmt)


def render_formatted(table: FormattedTable, fmt: Format) -> str:
    """Return a formatted table as text; as CSV only its cells."""
    if fmt == "md":
        return render_markdown(table)
    if fmt == "latex":
        return render_latex(table)
    rows = [row for part in table.parts for row in part.rows]
    lines = [[row.group, *(cell.text for cell in row.cells)] for row in rows]
    return _as_csv(lines, ["Group", *table.parts[0].header])


def render_markdown(table: FormattedTable) -> str:
    """Return a table with aligned pipes, a heading row per group, and numbered footnotes."""
    text = [f"### {table.title}\n"]
    for index, part in enumerate(table.parts):
        if index:
            text.append(f"#### {part.title}\n")
        text.append(_markdown_part(part) + "\n")
    text += [
        f"{number}. {_escape_markdown(note)}" for number, note in enumerate(table.footnotes, 1)
    ]
    if table.footnotes:
        text.append("")
    text += [f"- {_escape_markdown(' '.join(note.split()))}" for note in table.notes]
    return "\n".join(text).rstrip() + "\n"


def _markdown_part(part: FormattedPart) -> str:
    header = list(part.header)
    body: list[list[str]] = []
    for group, rows in groupby(part.rows, key=attrgetter("group")):
        if group:
            body.append([f"**{_escape_markdown(group)}**"] + [""] * (len(header) - 1))
        body += [[_markdown_cell(cell, row) for cell in row.cells] for row in rows]
    # Group headings are long and would widen the first column of every row.
    plain = [row for row in body if not row[0].startswith("**")]
    widths = [max(len(row[i]) for row in [header, *plain]) for i in range(len(header))]
    # A colon at the end of the rule aligns a column of numbers to the right.
    rule = ["-" * width for width in widths[: part.labels]]
    rule += ["-" * (width - 1) + ":" for width in widths[part.labels :]]
    return "\n".join(_pipe(row, widths, part.labels) for row in [header, rule, *body])


def _markdown_cell(cell: FormattedCell, row: FormattedRow) -> str:
    text = _escape_markdown(cell.text)
    # A missing value (all dashes) is not set in italics.
    if row.kind == "difference" and cell.text.strip("-"):
        text = f"*{text}*"
    return text + "".join(f" [{mark}]" for mark in cell.marks)


def _escape_markdown(text: str) -> str:
    for special in ("|", "*", "_"):
        text = text.replace(special, f"\\{special}")
    return text


def _pipe(cells: Sequence[str], widths: Sequence[int], labels: int) -> str:
    padded = [
        cell.ljust(width) if i < labels else cell.rjust(width)
        for i, (cell, width) in enumerate(zip(cells, widths, strict=True))
    ]
    return f"| {' | '.join(padded)} |"


def render_latex(table: FormattedTable) -> str:
    r"""Return a `table` for booktabs, to `\input`: caption, one tabular per part, notes below."""
    text = [
        r"\begin{table}[p]",
        r"\centering\footnotesize",
        rf"\caption*{{{escape_latex(table.title)}}}",
    ]
    for index, part in enumerate(table.parts):
        if index:
            text.append(rf"\par\medskip\textit{{{escape_latex(part.title)}}}\par\smallskip")
        text += _latex_part(part)
    notes = [
        rf"\textsuperscript{{{number}}}\,{escape_latex(note)}"
        for number, note in enumerate(table.footnotes, 1)
    ]
    notes += [escape_latex(" ".join(note.split())) for note in table.notes]
    text += [
        r"\par\medskip\begin{minipage}{\linewidth}\scriptsize\raggedright",
        r"\par ".join(notes),
        r"\end{minipage}",
        r"\end{table}",
    ]
    return "\n".join(text) + "\n"


def _latex_part(part: FormattedPart) -> list[str]:
    columns = "l" * part.labels + "r" * (len(part.header) - part.labels)
    text = [
        rf"\begin{{tabular}}{{{columns}}}",
        r"\toprule",
        _latex_row([escape_latex(title) for title in part.header]),
        r"\midrule",
    ]
    body: list[str] = []
    for group, rows in groupby(part.rows, key=attrgetter("group")):
        # No space above the first group: \midrule has its own.
        if body:
            body.append(r"\addlinespace")
        if group:
            title = rf"\textit{{{escape_latex(group)}}}"
            body.append(rf"\multicolumn{{{len(part.header)}}}{{l}}{{{title}}} \\")
        body += [_latex_row([_latex_cell(cell) for cell in row.cells]) for row in rows]
    return [*text, *body, r"\bottomrule", r"\end{tabular}"]


def _latex_cell(cell: FormattedCell) -> str:
    text = escape_latex(cell.text)
    # Outside of math mode LaTeX sets "-" as a hyphen, which is too short for a minus sign.
    if text[:1] == "-" and text[1:2].isdigit():
        text = f"$-${text[1:]}"
    if cell.marks:
        text += rf"\textsuperscript{{{','.join(map(str, cell.marks))}}}"
    return text


def _latex_row(cells: Sequence[str]) -> str:
    return " & ".join(cells) + r" \\"


_LATEX = {
    "\\": r"\textbackslash{}",
    "~": r"\textasciitilde{}",
    "^": r"\textasciicircum{}",
    "±": r"$\pm$",
    "<": r"\textless{}",
    ">": r"\textgreater{}",
    **{special: f"\\{special}" for special in "_%&#${}"},
}


def escape_latex(text: str) -> str:
    """Return text for LaTeX; straight quotes in pairs become opening and closing ones."""
    # Character by character: replacing one after the other would escape the new backslashes again.
    escaped = "".join(_LATEX.get(character, character) for character in text)
    return re.sub('"([^"]*)"', r"``\1''", escaped)


CSV_COLUMNS = [
    "table",
    "part",
    "group",
    "method",
    "arch",
    "epochs",
    "line",
    "column",
    "paper",
    "ours",
    "std",
    "n",
    "difference",
    "setting",
    "run_ids",
    "differs",
    "note",
]


def render_csv(table: Table) -> str:
    """Return one record per cell of a table, with unrounded numbers; the leads are left out."""
    records = [
        {"table": table.name, "part": part, **record}
        for part, block in (("printed", table.printed), ("elsewhere", table.unmatched))
        for entry in block.entries
        for record in _records(entry, block)
    ]
    return _as_csv(records, CSV_COLUMNS)


def _as_csv(records: Sequence[object], columns: Sequence[str]) -> str:
    import pandas as pd

    # dtype=object keeps numbers as they are: a column with gaps would turn whole numbers into
    # floats.
    frame = pd.DataFrame(records, columns=list(columns), dtype=object)
    text: str = frame.to_csv(index=False, lineterminator="\n", na_rep="")
    return text


def _records(entry: Entry, block: Block) -> Iterator[dict[str, object]]:
    """Yield a record for each cell of ours, and for each printed number or note without one."""
    for key in block.columns:
        common: dict[str, object] = {
            "group": entry.group,
            "method": entry.method,
            "arch": entry.arch,
            "epochs": entry.epochs,
            "column": key,
            "paper": entry.paper.get(key, ""),
            "note": entry.notes.get(key, ""),
        }
        filled = [ours for ours in entry.ours if key in ours.cells]
        if not filled and key in entry.slots:
            yield common
        for ours in filled:
            cell = ours.cells[key]
            # Rounded, since the subtraction of two decimals leaves digits that nobody printed.
            difference = round(cell.value - entry.paper[key], 6) if key in entry.paper else ""
            yield {
                **common,
                "line": ours.label,
                "ours": cell.value,
                "std": "" if cell.spread is None else cell.spread,
                "n": len(cell.results),
                "difference": difference,
                "setting": cell.setting,
                "run_ids": " ".join(result.row.run_id for result in cell.results),
                "differs": "; ".join(cell.results[0].differs),
            }
