"""Names made to do harm in whatever reads our output, and files that are not ours to replace."""

import csv
import io
import os
import re
import shutil
import subprocess
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from html.parser import HTMLParser
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
from markdown_it import MarkdownIt
from PIL import Image

from pipeline.files import OverwriteError, check_overwrite, write_atomic
from pipeline.reading import validate_model
from pipeline.spec import ConfigError
from pipeline.text import clean_line
from results.collect import CollectedResults, make_collection
from results.formatted import FormattedCell, FormattedPart, FormattedRow, FormattedTable
from results.render import _as_csv, escape_latex, render_latex, render_markdown, render_table
from results.report.graph import Node
from results.report.page import render_report
from results.runs import FinishedRun
from results.schema import Result, ResultRow
from results.spec import table_names
from results.store import read_results, write_rows
from results.tables import build_tables
from stages.shared.image_data import ConvertConfig

NAMES = [
    "=1+1",
    "+1+1",
    "-1+1",
    "@SUM(A1)",
    " =cmd|' /C calc'!A0",
    "\t=1+1",
    "\r=1+1",
    "a\rb",
    "a\nb",
    "a\u2028b",
    "a\x85b",
    "a\x1b[31mb",
    "a\x1b]0;title\x07b",
    "a\x9b31mb",
    "a\u202eb",
    "<script>alert(1)</script>",
    "\\<script>alert(1)</script>",
    "<img src=x onerror=alert(1)>",
    "<javascript:alert(1)>",
    "[x](javascript:alert(1))",
    "![x](http://x.invalid/y.png)",
    "[x][y]",
    "`code`",
    "a|b",
    "[1em] x",
    "* x",
    "\\input{/etc/passwd}",
    "a % b & c # $x$ ~ ^",
]


def table(name: str) -> FormattedTable:
    """A table with this name wherever a name can be."""
    row = FormattedRow(name, "ours", (FormattedCell(name, (1,)), FormattedCell(name)))
    part = FormattedPart(name, ("Method", "Value"), 1, (row, row))
    return FormattedTable("x", "Title", (part,), (name,), (name,))


@pytest.mark.parametrize("name", NAMES)
def test_no_spreadsheet_takes_a_cell_for_a_formula_and_no_row_is_broken(name: str) -> None:
    text = _as_csv([[name, 1.5, -2.5, "-3.5", "--"]] * 2, ["a", "b", "c", "d", "e"])
    assert len(text.splitlines()) == 3, "also for a reader that knows more line ends than LF"
    rows = list(csv.reader(io.StringIO(text, newline="")))
    assert rows[1][1:] == ["1.5", "-2.5", "-3.5", "--"]
    assert rows[1][0].lstrip()[:1] not in ("=", "+", "-", "@")
    assert "\x1b" not in text and "\u202e" not in text


@pytest.mark.parametrize("name", NAMES)
def test_markdown_holds_no_markup_of_a_name(name: str) -> None:
    text = render_markdown(table(name))
    # Without what a backslash makes plain text.
    plain = re.sub(r"\\[!-/:-@\[-`{-~]", "", text)
    assert "<" not in plain and "`" not in plain and not re.search(r"\][(\[:]", plain)
    rows = [line for line in text.splitlines() if line.startswith("|")]
    assert len(rows) == 5 and all(len(re.findall(r"(?<!\\)\|", row)) == 3 for row in rows)


@pytest.mark.parametrize("name", NAMES)
def test_latex_takes_no_name_for_a_command_or_an_argument(name: str) -> None:
    text = render_latex(table(name))
    ends = re.findall(r"\\\\\n\s*(\S)", text)
    assert ends and not {"[", "*"} & set(ends)
    assert "\\input" not in text and "\x1b" not in text
    assert escape_latex(name).count("\n") == 0


@pytest.mark.parametrize("name", NAMES)
def test_a_line_is_one_line_and_commands_no_terminal(name: str) -> None:
    found = clean_line(name)
    assert len(found.splitlines()) == 1
    assert all(sign == "\t" or sign.isprintable() for sign in found)
    assert clean_line(found) == found


def table_of_all() -> FormattedTable:
    """One table with a row, a group, a footnote and a note for each name."""
    rows = tuple(
        FormattedRow(name, "ours", (FormattedCell(name, (number,)), FormattedCell(name)))
        for number, name in enumerate(NAMES, 1)
    )
    part = FormattedPart("Names", ("Method", "Value"), 1, rows)
    return FormattedTable("x", "Title", (part, replace(part, title=NAMES[0])), (*NAMES,), (*NAMES,))


class Html(HTMLParser):
    """Tags and attributes of a page, and the texts of the cells of each row."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: set[str] = set()
        self.attributes: set[str] = set()
        self.rows: list[list[str]] = []
        self.inside = False
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.add(tag)
        self.attributes |= {name for name, _ in attrs}
        if tag == "tr":
            self.rows.append([])
        elif tag in ("td", "th"):
            self.rows[-1].append("")
            self.inside = True

    def handle_endtag(self, tag: str) -> None:
        self.inside = self.inside and tag not in ("td", "th")

    def handle_data(self, data: str) -> None:
        if self.inside:
            self.rows[-1][-1] += data


@pytest.mark.parametrize(
    "note",
    ["- x", "+ x", "1. x", "12) x", "# x", "> x", ">x", "~~~", "---", "***", "- - x", "=", ""],
)
def test_a_note_begins_no_block_of_its_own(note: str) -> None:
    text = render_markdown(replace(table("x"), footnotes=(note,), notes=(note, "y")))
    html = MarkdownIt("commonmark", {"html": True}).enable("table").render(text)
    found = re.findall(r"<li>(.*?)</li>", html, re.DOTALL)
    assert [each.replace("&gt;", ">") for each in found] == [note, note, "y"]


def test_markdown_as_html_shows_all_names_as_they_are() -> None:
    text = render_markdown(table_of_all())
    html = Html(MarkdownIt("commonmark", {"html": True}).enable("table").render(text))
    structure = {"h3", "h4", "table", "thead", "tbody", "tr", "th", "td", "strong", "ol", "ul"}
    assert html.tags == structure | {"li"} and html.attributes <= {"style"}
    assert all(len(row) == 2 for row in html.rows) and len(html.rows) == 2 * (1 + 2 * len(NAMES))
    shown = [" ".join(row[0].split()) for row in html.rows[1 : 1 + 2 * len(NAMES)]]
    names = [" ".join(clean_line(name).split()) for name in NAMES]
    assert shown[::2] == names
    assert shown[1::2] == [f"{name} [{number}]" for number, name in enumerate(names, 1)]


LATEX = r"""\documentclass{article}
\usepackage[utf8]{inputenc}
\usepackage[T1]{fontenc}
\usepackage[a4paper,margin=15mm]{geometry}
\usepackage{booktabs,caption}
\begin{document}
%s
\end{document}
"""


@pytest.mark.slow
def test_latex_compiles_and_shows_all_names(tmp_path: Path) -> None:
    compiler = shutil.which("pdflatex")
    if compiler is None:
        pytest.skip(
            "no pdflatex on PATH "
            "(Debian: apt-get install texlive-latex-base texlive-latex-recommended)"
        )
    # Upright, so that the log says of each row what was set: \showbox would need more.
    (tmp_path / "x.tex").write_text(LATEX % render_latex(table_of_all()), encoding="utf-8")
    command = [compiler, "-no-shell-escape", "-recorder", "-interaction=nonstopmode"]
    done = subprocess.run(
        [*command, "-halt-on-error", "x.tex"],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        errors="replace",
        timeout=120,
    )
    assert done.returncode == 0, done.stdout[-3000:]
    assert (tmp_path / "x.pdf").stat().st_size > 10_000
    read = (tmp_path / "x.fls").read_text()
    assert "passwd" not in read and "write18" not in done.stdout, "a name was taken for a command"
    assert "Missing" not in done.stdout and "undefined" not in done.stdout


def rows_of_all() -> list[ResultRow]:
    """A row for each name, which is its method, data set and setting."""
    return [
        ResultRow(f"r{n:02}", name, "vit_s16", 100, "knn", name, name, "top1", 50.0 + n, "%", 0)
        for n, name in enumerate(NAMES)
    ]


def collection_of_all(root: Path) -> CollectedResults:
    """Finished runs whose records have these names wherever they may hold text."""
    runs = {}
    for number, name in enumerate(NAMES):
        run_id = f"r{number:02}"
        folder = root / "knn" / f"knn-{run_id}"
        folder.mkdir(parents=True)
        Image.new("RGB", (30, 20), "teal").save(folder / "x.png")
        runs[run_id] = FinishedRun(
            run_id,
            "knn",
            "knn",
            config={"dataset": name, name: name},
            versions={"torch": name},
            git_sha=name,
            finished=name,
            device=name,
            outputs={name: f"knn/knn-{run_id}/x.png"},
            info={"captions": {name: name}, "colours": {name: {name: name, "x": f"red;{name}"}}},
        )
    results = [
        Result(row, f"{row.method}, line 2", variant=row.method, differs=(row.method,))
        for row in rows_of_all()
    ]
    return make_collection(results, runs, NAMES)


def test_tables_of_such_results_have_a_row_for_each(tmp_path: Path) -> None:
    collection = collection_of_all(tmp_path)
    (table,) = (table for table in build_tables(collection.results, table_names()) if table.used)
    records = list(csv.reader(io.StringIO(render_table(table, "csv"), newline="")))
    ours = [record for record in records if record[9] not in ("", "ours")]
    assert sorted(float(record[9]) for record in ours) == [50.0 + n for n in range(len(NAMES))]
    for record in records:
        assert len(record) == len(records[0])
        for cell in record:
            number = re.fullmatch(r"[-+]?[\d.]+|--", cell)
            assert number or cell.lstrip()[:1] not in ("=", "+", "-", "@"), cell
            assert len(cell.splitlines()) <= 1


def test_rows_of_such_names_are_read_as_they_were_written(tmp_path: Path) -> None:
    path = tmp_path / "rows.csv"
    write_rows(path, rows_of_all())
    assert len(path.read_text().splitlines()) == 1 + len(NAMES)
    found, refused = read_results(path)
    assert refused == [] and [result.row.value for result in found] == [
        row.value for row in rows_of_all()
    ]
    assert [result.row.dataset for result in found] == [clean_line(name) for name in NAMES]


@pytest.mark.parametrize("name", [name for name in NAMES if not name[0].isalnum()] + ["a\rb", ""])
def test_what_rows_are_called_is_checked_before_anything_runs(name: str) -> None:
    values = {"dataset": name, "train_dir": "x", "val_dir": "x"}
    with pytest.raises(ConfigError, match="dataset: expected one line of text that begins with"):
        validate_model(ConvertConfig, values, "runs.x")
    validate_model(ConvertConfig, values | {"dataset": "Größe 2, (a|b)"}, "runs.x")


class Proxy(BaseHTTPRequestHandler):
    """Notes what a browser asks for, and gives nothing."""

    asked: list[str]

    def do_GET(self) -> None:
        self.asked.append(self.path)
        self.send_error(404)

    do_CONNECT = do_POST = do_HEAD = do_GET

    def log_message(self, format: str, *args: object) -> None:
        """Print nothing."""


@contextmanager
def watched_network() -> Iterator[tuple[str, list[str]]]:
    """A proxy for all that a browser asks for: its address, and what was asked for."""
    asked: list[str] = []
    handler = type("Watching", (Proxy,), {"asked": asked})
    with ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        try:
            yield f"http://127.0.0.1:{server.server_port}", asked
        finally:
            server.shutdown()


# Says what the page holds. Before it, `alert` is made to say that it was called.
WATCH = """<script>alert = (text) => console.log("alert was called: " + text);</script>"""


def open_in_browser(page: Path, *options: str) -> tuple[str, list[str], list[str]]:
    """The page as Chromium holds it, the lines of its console, and what it asked for."""
    browser: str | None = None
    for name in ("chromium", "google-chrome", "chromium-browser"):
        browser = browser or shutil.which(name)
    if browser is None:
        pytest.skip("no Chromium on PATH (Debian: apt-get install chromium)")
    with watched_network() as (proxy, asked):
        done = subprocess.run(
            [
                browser,
                "--headless=new",
                "--no-sandbox",
                "--disable-gpu",
                "--disable-background-networking",
                "--disable-component-update",
                "--no-first-run",
                f"--user-data-dir={page.parent}/profile",
                f"--proxy-server={proxy}",
                "--enable-logging=stderr",
                "--virtual-time-budget=3000",
                "--dump-dom",
                page.as_uri(),
            ],
            capture_output=True,
            text=True,
            timeout=180,
        )
    assert "</html>" in done.stdout, done.stderr[-2000:]
    # The other addresses are those that Chromium asks for of its own accord, whatever the page.
    asked = [address for address in asked if ".invalid" in address]
    return done.stdout, [x for x in done.stderr.splitlines() if "CONSOLE" in x], asked


@pytest.mark.slow
def test_in_a_browser_nothing_runs_and_nothing_is_fetched(tmp_path: Path) -> None:
    root = tmp_path / "runs"
    nodes = [
        Node(f"r{number:02}", name, name, name, name, ("r00",) if number else ())
        for number, name in enumerate(NAMES)
    ]
    said = {f"r{number:02}": [name] for number, name in enumerate(NAMES)}
    text = render_report(collection_of_all(root), root, nodes=nodes, paper_says=said)
    page = tmp_path / "report.html"
    # Without its own policy: the escaping alone has to hold, and the policy in the next one too.
    bare, count = re.subn(r"<meta http-equiv=.Content-Security-Policy[^>]*>", WATCH, text)
    assert count == 1
    for content in (bare, text):
        page.write_text(content, encoding="utf-8")
        dom, console, asked = open_in_browser(page)
        assert console == [] and asked == []
        found = Html(dom)
        assert not found.tags & {"iframe", "object", "embed", "link-x", "form", "base"}
        assert not [name for name in found.attributes if name.startswith("on")]
        addresses = re.findall(r"(?:href|src|srcset)=\"([^\"]*)", dom)
        assert all(re.match("#|data:(image/|,)", address) for address in addresses)
    ours = [row for row in Html(text).rows if row and row[0].endswith("ours")]
    assert len(ours) >= len(NAMES)


@pytest.mark.slow
def test_what_runs_or_is_fetched_would_be_noticed(tmp_path: Path) -> None:
    page = tmp_path / "page.html"
    page.write_text(
        f"<html>{WATCH}<script>alert(1)</script><img src='http://x.invalid/y.png'></html>"
    )
    _, console, asked = open_in_browser(page)
    assert len(console) == 1 and "alert was called: 1" in console[0]
    assert asked == ["http://x.invalid/y.png"]


@pytest.mark.parametrize("name", ["mugs, w/o group", "DINO (ä)", "±0.3", "数据", "a\tb", ""])
def test_usual_text_stays(name: str) -> None:
    assert clean_line(name) == name


def test_only_what_we_wrote_is_overwritten(tmp_path: Path) -> None:
    path = tmp_path / "table1.md"
    check_overwrite(path, "### Table 1", force=False)
    path.write_text("### Table 1: old results\n")
    check_overwrite(path, "### Table 1", force=False)
    path.write_text("my notes")
    with pytest.raises(OverwriteError, match="was not written by this command"):
        check_overwrite(path, "### Table 1", force=False)
    check_overwrite(path, "### Table 1", force=True)


@pytest.mark.parametrize("force", [False, True])
def test_a_device_or_a_pipe_is_never_replaced(tmp_path: Path, force: bool) -> None:
    os.mkfifo(tmp_path / "pipe")
    for path in (Path("/dev/null"), tmp_path / "pipe", tmp_path):
        with pytest.raises(OverwriteError, match="it is not overwritten"):
            check_overwrite(path, "x", force=force)
    for path in (Path("/dev/null"), tmp_path / "pipe"):
        with pytest.raises(OSError, match="not a regular file"):
            write_atomic(path, "x")
    assert Path("/dev/null").is_char_device()
