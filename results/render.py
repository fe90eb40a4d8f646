"""Tables as Markdown, LaTeX (booktabs) and CSV; the same bytes in any locale, time zone and hash seed."""

import re
from collections.abc import Iterable, Sequence
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
    """Write tables in all three formats; file name -> path."""
    written = {}
    for table in tables:
        for fmt, suffix in SUFFIX.items():
            name = f"{table.name}.{suffix}"
            written[name] = write_atomic(out_dir / name, render_table(table, fmt))
    return written


def render_table(table: Table, fmt: Format) -> str:
    """A table in a format."""
    return render_csv(table) if fmt == "csv" else render_formatted(format_table(table), fmt)


def render_formatted(laid: FormattedTable, fmt: Format) -> str:
    """Anything laid out, in a format; as CSV only its cells."""
    if fmt == "csv":
        lines = [
            [line.group, *(cell.text for cell in line.cells)]
            for part in laid.parts
            for line in part.lines
        ]
        return _as_csv(lines, ["Group", *laid.parts[0].header])
    return render_markdown(laid) if fmt == "md" else render_latex(laid)


def render_markdown(laid: FormattedTable) -> str:
    """Aligned pipes, a heading row per group, footnotes as a numbered list."""
    text = [f"### {laid.title}\n"]
    for index, part in enumerate(laid.parts):
        if index:
            text.append(f"#### {part.title}\n")
        text.append(_pipes(part) + "\n")
    text += [f"{number}. {_md(note)}" for number, note in enumerate(laid.footnotes, 1)]
    text += [""] if laid.footnotes else []
    text += [f"- {_md(' '.join(note.split()))}" for note in laid.notes]
    return "\n".join(text).rstrip() + "\n"


def _pipes(part: FormattedPart) -> str:
    body: list[list[str]] = []
    group = ""
    for line in part.lines:
        if line.group != group:
            group = line.group
            body.append([f"**{_md(group)}**"] + [""] * (len(part.header) - 1))
        body.append([_md_cell(cell, line) for cell in line.cells])
    plain = [row for row in body if not row[0].startswith("**")]
    widths = [
        max(len(row[i]) for row in [list(part.header), *plain]) for i in range(len(part.header))
    ]
    rule = [
        "-" * (w if i < part.labels else w - 1) + ("" if i < part.labels else ":")
        for i, w in enumerate(widths)
    ]
    return "\n".join(_pipe(row, widths, part.labels) for row in [list(part.header), rule, *body])


def _md_cell(cell: FormattedCell, line: FormattedRow) -> str:
    text = (
        f"*{_md(cell.text)}*"
        if line.kind == "difference" and cell.text.strip("-")
        else _md(cell.text)
    )
    return text + "".join(f" [{mark}]" for mark in cell.marks)


def _md(text: str) -> str:
    for special in ("|", "*", "_"):
        text = text.replace(special, f"\\{special}")
    return text


def _pipe(cells: Sequence[str], widths: Sequence[int], labels: int) -> str:
    padded = (
        c.ljust(w) if i < labels else c.rjust(w)
        for i, (c, w) in enumerate(zip(cells, widths, strict=True))
    )
    return "| " + " | ".join(padded) + " |"


def render_latex(laid: FormattedTable) -> str:
    """A `table` for booktabs: caption, one tabular per part, notes below; input it in a document."""
    text = [
        r"\begin{table}[p]",
        r"\centering\footnotesize",
        rf"\caption*{{{escape_latex(laid.title)}}}",
    ]
    for index, part in enumerate(laid.parts):
        text += (
            [rf"\par\medskip\textit{{{escape_latex(part.title)}}}\par\smallskip"] if index else []
        )
        text += _tabular(part)
    notes = [
        rf"\textsuperscript{{{n}}}\,{escape_latex(note)}"
        for n, note in enumerate(laid.footnotes, 1)
    ]
    notes += [escape_latex(" ".join(note.split())) for note in laid.notes]
    text += [
        r"\par\medskip\begin{minipage}{\linewidth}\scriptsize\raggedright",
        r"\par ".join(notes),
        r"\end{minipage}",
    ]
    return "\n".join([*text, r"\end{table}"]) + "\n"


def _tabular(part: FormattedPart) -> list[str]:
    columns = "l" * part.labels + "r" * (len(part.header) - part.labels)
    text = [
        rf"\begin{{tabular}}{{{columns}}}",
        r"\toprule",
        _row([escape_latex(c) for c in part.header]),
        r"\midrule",
    ]
    group = ""
    for line in part.lines:
        if line.group != group:
            text += [r"\addlinespace"] if group else []
            group = line.group
            text.append(
                rf"\multicolumn{{{len(part.header)}}}{{l}}{{\textit{{{escape_latex(group)}}}}} \\"
            )
        text.append(_row([_tex_cell(cell) for cell in line.cells]))
    return [*text, r"\bottomrule", r"\end{tabular}"]


def _tex_cell(cell: FormattedCell) -> str:
    marks = ",".join(map(str, cell.marks))
    text = escape_latex(cell.text)
    text = f"$-${text[1:]}" if text[:1] == "-" and text[1:2].isdigit() else text
    return text + (rf"\textsuperscript{{{marks}}}" if marks else "")


def _row(cells: Sequence[str]) -> str:
    return " & ".join(cells) + r" \\"


_TEX = {
    "\\": r"\textbackslash{}",
    "~": r"\textasciitilde{}",
    "^": r"\textasciicircum{}",
    "±": r"$\pm$",
}
_TEX |= {special: f"\\{special}" for special in "_%&#${}"}
_TEX |= {"<": r"\textless{}", ">": r"\textgreater{}"}


def escape_latex(text: str) -> str:
    """Text for LaTeX; straight quotes in pairs become opening and closing ones."""
    escaped = "".join(_TEX.get(character, character) for character in text)
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
    """One record per cell of a table, numbers unrounded; the leads are not among them."""
    records = [
        {"table": table.name, "part": part, **record}
        for part, block in (("printed", table.printed), ("elsewhere", table.unmatched))
        for entry in block.entries
        for record in _records(entry, block)
    ]
    return _as_csv(records, CSV_COLUMNS)


def _as_csv(records: Sequence[object], columns: Sequence[str]) -> str:
    import pandas as pd

    frame = pd.DataFrame(records, columns=list(columns), dtype=object)
    text: str = frame.to_csv(index=False, lineterminator="\n", na_rep="")
    return text


def _records(entry: Entry, block: Block) -> Iterable[dict[str, object]]:
    labels = {
        "group": entry.group,
        "method": entry.method,
        "arch": entry.arch,
        "epochs": entry.epochs,
    }
    for key in block.columns:
        paper = entry.paper.get(key, "")
        note = entry.notes.get(key, "")
        if not any(key in ours.cells for ours in entry.ours) and (paper != "" or note):
            yield {**labels, "column": key, "paper": paper, "note": note}
        for ours in entry.ours:
            if cell := ours.cells.get(key):
                yield {
                    **labels,
                    "line": ours.label,
                    "column": key,
                    "paper": paper,
                    "ours": cell.value,
                    "std": "" if cell.spread is None else cell.spread,
                    "n": cell.seeds,
                    "difference": "" if paper == "" else round(cell.value - float(paper), 6),
                    "setting": cell.setting,
                    "run_ids": " ".join(result.row.run_id for result in cell.results),
                    "differs": "; ".join(cell.results[0].differs),
                    "note": note,
                }
