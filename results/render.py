"""Tables as Markdown, LaTeX (booktabs) and CSV.

The same table gives the same bytes in any locale, time zone and hash seed.
"""

import re
from collections.abc import Iterator, Mapping, Sequence
from itertools import groupby
from operator import attrgetter
from pathlib import Path
from typing import Literal

from pipeline.files import check_overwrite, write_atomic
from pipeline.text import clean_line
from results.formatted import (
    MISSING,
    FormattedCell,
    FormattedPart,
    FormattedRow,
    FormattedTable,
    format_table,
)
from results.tables import Block, Entry, Table
from results.verdict import describe_verdict

Format = Literal["md", "latex", "csv"]
SUFFIX: dict[Format, str] = {"md": "md", "latex": "tex", "csv": "csv"}


def write_tables(
    tables: Sequence[Table], out_dir: Path, *, margin: float | None = None, force: bool = False
) -> dict[str, Path]:
    """Write tables in all three formats; return the paths by file name.

    With a margin, they have verdicts.

    Raises:
        OverwriteError: a file there is none of ours, and `force` is not given.
    """
    texts = {
        f"{table.name}.{suffix}": render_table(table, fmt, margin)
        for table in tables
        for fmt, suffix in SUFFIX.items()
    }
    # All are looked at before the first is written. Ours begin alike, whatever the results are and
    # with or without verdicts.
    for name, text in texts.items():
        mark = text.partition("\n")[0].removesuffix("," + ",".join(VERDICT_COLUMNS))
        check_overwrite(out_dir / name, mark, force=force)
    return {name: write_atomic(out_dir / name, text) for name, text in texts.items()}


def render_table(table: Table, fmt: Format, margin: float | None = None) -> str:
    """Return a table as text; with a margin, it has verdicts."""
    # The CSV has unrounded numbers and no footnotes, so it is made from the table itself.
    if fmt == "csv":
        return render_csv(table, margin)
    return render_formatted(format_table(table, margin), fmt)


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
    text = [f"### {_escape_markdown(table.title)}\n"]
    for index, part in enumerate(table.parts):
        if index:
            text.append(f"#### {_escape_markdown(part.title)}\n")
        text.append(_markdown_part(part) + "\n")
    text += [
        f"{number}. {_escape_markdown_note(note)}" for number, note in enumerate(table.footnotes, 1)
    ]
    if table.footnotes:
        text.append("")
    text += [f"- {_escape_markdown_note(note)}" for note in table.notes]
    return "\n".join(text).rstrip() + "\n"


def _markdown_part(part: FormattedPart) -> str:
    header = [_escape_markdown(title) for title in part.header]
    body: list[list[str]] = []
    for group, rows in groupby(part.rows, key=attrgetter("group")):
        if group:
            body.append([f"**{_escape_markdown(group).strip()}**"] + [""] * (len(header) - 1))
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
    if row.kind in ("difference", "verdict") and cell.text.strip("-"):
        text = f"*{text.strip()}*"
    return text + "".join(f" [{mark}]" for mark in cell.marks)


def _escape_markdown(text: str) -> str:
    """Return text for a cell or a note: no markup, link or HTML of its own."""
    return _MARKDOWN.sub(r"\\\g<0>", clean_line(text))


def _escape_markdown_note(text: str) -> str:
    """Return text for a note, which does not begin a list, a heading, a quotation or the like."""
    return _BLOCK.sub(r"\1\\\2", _escape_markdown(" ".join(text.split())))


# What makes a block of its own at the begin of a line: `- x`, `1. x`, `# x`, `> x`, `~~~`, `---`.
_BLOCK = re.compile(r"^(\d{0,9})([-+#>~=.)])")
# A bracket is left alone unless it makes a link: notes have many.
_MARKDOWN = re.compile(r"[|*_`\\<]|\](?=[(\[:])")


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
    # After the line end of the row before, LaTeX takes these as arguments of it.
    if cells[0].lstrip()[:1] in ("[", "*"):
        cells = ["{}" + cells[0], *cells[1:]]
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
    escaped = "".join(_LATEX.get(character, character) for character in clean_line(text))
    return re.sub('"([^"]*)"', r"``\1''", escaped)


# Cells by column, or in the order of the columns.
Record = Mapping[str, object] | Sequence[object]
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
# The last ones, if verdicts are asked for.
VERDICT_COLUMNS = ["verdict", "choices", "fixed_setting", "fixed_value"]


def render_csv(table: Table, margin: float | None = None) -> str:
    """Return one record per cell of a table, with unrounded numbers; the leads are left out.

    With a margin, the last columns have verdicts, and the setting fixed in advance.
    """
    records = [
        {"table": table.name, "part": part, **record}
        for part, block in (("printed", table.printed), ("elsewhere", table.unmatched))
        for entry in block.entries
        for record in _records(entry, block, margin)
    ]
    return _as_csv(records, CSV_COLUMNS if margin is None else [*CSV_COLUMNS, *VERDICT_COLUMNS])


def _as_csv(records: Sequence[Record], columns: Sequence[str]) -> str:
    import pandas as pd

    # dtype=object keeps numbers as they are: a column with gaps would turn whole numbers into
    # floats.
    frame = pd.DataFrame(
        [_escape_record(record) for record in records], columns=list(columns), dtype=object
    )
    text: str = frame.to_csv(index=False, lineterminator="\n", na_rep="")
    return text


def _escape_record(record: Record) -> Record:
    if isinstance(record, Mapping):
        return {key: _escape_csv(value) for key, value in record.items()}
    return [_escape_csv(value) for value in record]


def _escape_csv(value: object) -> object:
    """Return a cell that no spreadsheet takes for a formula, and that ends no row."""
    if not isinstance(value, str):
        return value
    text = clean_line(value)
    begin = text.lstrip()[:1]
    if begin not in ("=", "+", "-", "@") or text == MISSING:
        return text
    try:
        float(text.replace(",", ""))
    except ValueError:
        return f"'{text}"
    return text


def _records(entry: Entry, block: Block, margin: float | None) -> Iterator[dict[str, object]]:
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
            if margin is not None and key in entry.paper:
                fixed = cell.fixed or ("", "")
                verdict = describe_verdict(cell, entry.paper[key], margin)
                values = (verdict, cell.choices, *fixed)
                common |= dict(zip(VERDICT_COLUMNS, values, strict=True))
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
