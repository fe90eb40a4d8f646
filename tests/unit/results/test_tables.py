"""Tables are pure functions of rows, the paper's numbers beside ours."""

from dataclasses import replace
from pathlib import Path

import pytest

from results.cells import CellError
from results.schema import ResultRow
from results.store import RowsError, read_rows, write_rows
from results.tables import escape, render, write_all

ROW = ResultRow("abc", "mugs", "vit_s16", 800, "knn", "imagenet1k", "cls, k=20, T=0.05", "top1", 75.1, "%", 0)


def line(text: str, *words: str) -> str:
    found = [part for part in text.splitlines() if all(word in part for word in words) and part.startswith("|")]
    assert len(found) == 1, found
    return found[0]


def test_ours_stands_beside_the_paper_with_the_difference() -> None:
    rows = [ROW, replace(ROW, setting="cls, k=10, T=0.05", value=74.0)]
    cells = [c.strip() for c in line(render("table1", rows), "Mugs", "vit_s16", "3200").split("|")]
    assert cells[5:11] == ["78.9", "--", "--", "75.6", "75.1", "-0.5"]


def test_without_rows_ours_is_empty() -> None:
    cells = [c.strip() for c in line(render("table1", []), "Mugs", "vit_l16", "1000").split("|")]
    assert cells[5:11] == ["82.1", "--", "--", "80.3", "--", "--"]


def test_mini_rows_have_a_group_of_their_own() -> None:
    rows = [
        replace(ROW, arch="vit_mini", dataset="sklearn_digits", method=m) for m in ("mugs", "mugs (initialisation)")
    ]
    text = render("table1", rows)
    assert "not comparable with ImageNet-1K" in text
    assert "75.1" in line(text, "Mugs (initialisation)", "vit_mini")


def test_seeds_give_mean_and_spread() -> None:
    rows = [replace(ROW, seed=s, value=v, run_id=str(s)) for s, v in enumerate((74.0, 75.0, 76.0))]
    assert "75.0 ± 1.0" in render("table1", rows)
    assert r"75.0 $\pm$ 1.0" in render("table1", rows, "latex")


def test_two_rows_for_one_cell_are_refused() -> None:
    with pytest.raises(CellError, match=r"abc.*other"):
        render("table1", [ROW, replace(ROW, run_id="other")])


def test_unknown_table_and_format() -> None:
    with pytest.raises(ValueError, match="table1"):
        render("table99", [])
    with pytest.raises(ValueError, match="latex"):
        render("table1", [], "pdf")  # type: ignore[arg-type]


def test_all_formats_are_written(tmp_path: Path) -> None:
    assert set(write_all([ROW], tmp_path)) == {"table1.md", "table1.tex", "table1.csv"}
    assert (tmp_path / "table1.csv").read_text().startswith("Group,Method,Arch")
    assert escape("a_b 5% & #") == r"a\_b 5\% \& \#"


def test_rows_survive_a_round_trip(tmp_path: Path) -> None:
    write_rows(tmp_path / "rows.csv", [ROW])
    assert read_rows(tmp_path / "rows.csv") == [ROW]


def test_a_damaged_row_names_file_and_line(tmp_path: Path) -> None:
    path = tmp_path / "rows.csv"
    write_rows(path, [ROW, ROW])
    path.write_text(path.read_text().replace("75.1", "many", 1))
    with pytest.raises(RowsError, match=r"rows\.csv, line 2"):
        read_rows(path)
