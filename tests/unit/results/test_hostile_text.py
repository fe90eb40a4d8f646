"""Names made to do harm in whatever reads our output, and files that are not ours to replace."""

import csv
import io
import os
import re
from pathlib import Path

import pytest

from pipeline.files import OverwriteError, check_overwrite, write_atomic
from pipeline.text import clean_line
from results.formatted import FormattedCell, FormattedPart, FormattedRow, FormattedTable
from results.render import _as_csv, escape_latex, render_latex, render_markdown

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
