"""The paper's tables, ours beside the paper's: pure functions of rows, specs and the paper's numbers."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path
from typing import Any, Literal

import pandas as pd
import yaml

from results.cells import Cell, best_cell
from results.schema import ResultRow

Format = Literal["md", "latex", "csv"]
SUFFIX: dict[Format, str] = {"md": "md", "latex": "tex", "csv": "csv"}
MISSING = "--"
MINI = {"sklearn_digits": "Mini data set (scikit-learn digits, 10 classes): not comparable with ImageNet-1K"}


@dataclass(frozen=True)
class Table:
    """Title, cells as text (first column `Group`), and footnotes."""

    title: str
    cells: pd.DataFrame
    notes: list[str]


def names() -> list[str]:
    """Tables there are specs for."""
    specs = files("results").joinpath("specs")
    return sorted(p.name.removesuffix(".yaml") for p in specs.iterdir() if p.name.endswith(".yaml"))


def write_all(rows: Sequence[ResultRow], out_dir: Path, tables: Sequence[str] | None = None) -> dict[str, Path]:
    """Write every table in all three formats; file name -> path."""
    out_dir.mkdir(parents=True, exist_ok=True)
    written = {}
    for name in tables or names():
        table = build(name, rows)
        for fmt, suffix in SUFFIX.items():
            path = out_dir / f"{name}.{suffix}"
            path.write_text(to_text(table, fmt), encoding="utf-8")
            written[path.name] = path
    return written


def render(name: str, rows: Sequence[ResultRow], fmt: Format = "md") -> str:
    """One table as text. Raises ValueError for a table or format that does not exist."""
    if fmt not in SUFFIX:
        raise ValueError(f"unknown format {fmt!r} (valid: {', '.join(SUFFIX)})")
    return to_text(build(name, rows), fmt)


def build(name: str, rows: Sequence[ResultRow]) -> Table:
    """Paper's rows with ours joined, then our rows the paper has none for, then rows of other data sets."""
    if name not in names():
        raise ValueError(f"unknown table {name!r} (valid: {', '.join(names())})")
    spec: dict[str, Any] = yaml.safe_load(files("results").joinpath("specs", f"{name}.yaml").read_text("utf-8"))
    with files("results").joinpath("paper", spec["paper"]).open(encoding="utf-8") as stream:
        paper = pd.read_csv(stream)
    notes = [" ".join(spec["note"].split())]
    rows = [row for row in rows if row.metric == spec["metric"]]
    here = [row for row in rows if row.dataset == spec["dataset"]]
    lines, used = _paper_lines(spec, paper, here, notes)
    rest = [row for row in here if _identity(spec, row) not in used]
    lines += _our_lines(spec, rest, "Ours, without a counterpart in the paper", notes)
    for dataset in sorted({row.dataset for row in rows} - {spec["dataset"]}):
        group = MINI.get(dataset, f"Other data set ({dataset}): not comparable with ImageNet-1K")
        lines += _our_lines(spec, [row for row in rows if row.dataset == dataset], group, notes)
    return Table(spec["title"], pd.DataFrame(lines), notes)


def _identity(spec: dict[str, Any], row: ResultRow) -> tuple[str, str, int]:
    """(method, arch, effective epochs) as the paper has them."""
    return spec["methods"].get(row.method, row.method), row.arch, row.epochs * spec["effective_epochs"]


def _paper_lines(
    spec: dict[str, Any], paper: pd.DataFrame, rows: list[ResultRow], notes: list[str]
) -> tuple[list[dict[str, str]], set[tuple[str, str, int]]]:
    lines, used = [], set()
    for key, entry in paper.groupby(["group", "method", "arch", "params_m", "effective_epochs"], sort=False):
        group, method, arch, params, printed_epochs = map(str, key)
        epochs = int(printed_epochs)
        mine = [row for row in rows if _identity(spec, row) == (method, arch, epochs)]
        used.add((method, arch, epochs))
        line = {"Group": group, "Method": method, "Arch": arch, "Params (M)": params, "Epochs": printed_epochs}
        for column in spec["columns"]:
            printed = entry.loc[entry["task"] == column["task"], "value"]
            value = None if printed.empty else float(printed.iloc[0])
            line |= _columns(column, value, mine, f"{method} {arch}, {epochs} epochs", notes)
        lines.append(line)
    return lines, used


def _our_lines(spec: dict[str, Any], rows: list[ResultRow], group: str, notes: list[str]) -> list[dict[str, str]]:
    lines = []
    for method, arch, epochs in sorted({(row.method, row.arch, row.epochs) for row in rows}):
        mine = [row for row in rows if (row.method, row.arch, row.epochs) == (method, arch, epochs)]
        shown = method
        for ours, theirs in spec["methods"].items():
            shown = shown.replace(ours, theirs, 1) if shown.startswith(ours) else shown
        line = {"Group": group, "Method": shown, "Arch": arch, "Params (M)": MISSING}
        line["Epochs"] = "0" if method.endswith("(initialisation)") else str(epochs)
        for column in spec["columns"]:
            line |= _columns(column, None, mine, f"{shown} {arch}, {mine[0].dataset}", notes)
        lines.append(line)
    return lines


def _columns(
    column: dict[str, str], paper: float | None, rows: Iterable[ResultRow], label: str, notes: list[str]
) -> dict[str, str]:
    cell: Cell | None = best_cell(row for row in rows if row.stage == column["task"])
    title = column["title"]
    if cell is not None:
        last = "".join(f"; {s}: {v:.1f}" for s, v in cell.others if "last epoch" in s)
        notes.append(f"{title}, {label}: {cell.setting}{last}")
    difference = MISSING if cell is None or paper is None else f"{cell.value - paper:+.1f}"
    return {
        f"{title} paper": MISSING if paper is None else f"{paper:.1f}",
        f"{title} ours": MISSING if cell is None else cell.text(),
        f"{title} diff": difference,
    }


def to_text(table: Table, fmt: Format) -> str:
    """Markdown with one heading row per group, LaTeX (booktabs), or plain CSV."""
    if fmt == "csv":
        return table.cells.to_csv(index=False, lineterminator="\n")
    return _markdown(table) if fmt == "md" else _latex(table)


def _markdown(table: Table) -> str:
    columns = [c for c in table.cells.columns if c != "Group"]
    body: list[list[str]] = []
    group = None
    for record in table.cells.to_dict("records"):
        if record["Group"] != group:
            group = record["Group"]
            body.append([f"**{group}**"] + [""] * (len(columns) - 1))
        body.append([str(record[c]) for c in columns])
    plain = [r for r in body if not r[0].startswith("**")]
    widths = [max(len(r[i]) for r in [columns, *plain]) for i in range(len(columns))]
    lines = [_pipe(columns, widths), _pipe(["-" * w for w in widths], widths)]
    lines += [_pipe(r, widths) for r in body]
    notes = "\n".join(f"- {note}" for note in table.notes)
    return f"### {table.title}\n\n" + "\n".join(lines) + f"\n\n{notes}\n"


def _pipe(cells: Sequence[str], widths: Sequence[int]) -> str:
    return "| " + " | ".join(c.ljust(w) for c, w in zip(cells, widths, strict=True)) + " |"


def _latex(table: Table) -> str:
    columns = [c for c in table.cells.columns if c != "Group"]
    lines = [r"\begin{tabular}{lll" + "r" * (len(columns) - 3) + "}", r"\toprule", _row(columns), r"\midrule"]
    group = None
    for record in table.cells.to_dict("records"):
        if record["Group"] != group:
            group = record["Group"]
            lines.append(rf"\multicolumn{{{len(columns)}}}{{l}}{{\textit{{{escape(group)}}}}} \\")
        lines.append(_row([str(record[c]) for c in columns]))
    lines += [r"\bottomrule", r"\end{tabular}"]
    return f"% {table.title}\n" + "\n".join(lines) + "\n" + "".join(f"% {note}\n" for note in table.notes)


def _row(cells: Sequence[str]) -> str:
    return " & ".join(escape(c) for c in cells) + r" \\"


def escape(text: str) -> str:
    """Text for LaTeX."""
    for plain, latex in (("\\", r"\textbackslash{}"), ("_", r"\_"), ("%", r"\%"), ("&", r"\&"), ("#", r"\#")):
        text = text.replace(plain, latex)
    return text.replace("±", r"$\pm$")
