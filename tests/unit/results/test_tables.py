"""Tables are pure functions of results, the paper's numbers beside ours."""

import re
import shutil
import subprocess
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from results.collect import CollectedResults
from results.render import Format, escape_latex, render_table, write_tables
from results.runs import FinishedRun
from results.schema import Result
from results.spec import table_names
from results.store import RowsError
from results.tables import build_table, build_tables, find_unplaced
from results.vocabulary import load_vocabulary
from stages import STAGES
from stages.commands.tables import add_cost_note

Make = Callable[..., list[Result]]


def render(name: str, results: list[Result], fmt: Format = "md") -> str:
    return render_table(build_table(name, results), fmt)


def cells(text: str, *words: str) -> list[str]:
    """Cells of the one Markdown line that has all the words."""
    pattern = ".*".join(map(re.escape, words))
    found = [
        part for part in text.splitlines() if part.startswith("|") and re.search(pattern, part)
    ]
    assert len(found) == 1, (words, found)
    return [cell.strip() for cell in found[0].split("|")[1:-1]]


def below(text: str, *words: str) -> list[str]:
    """Cells of the line after that one."""
    lines = text.splitlines()
    found = [i for i, part in enumerate(lines) if all(word in part for word in words)]
    return [cell.strip() for cell in lines[found[0] + 1].split("|")[1:-1]]


def test_there_are_ten_tables_the_figure_and_those_of_mgc() -> None:
    mgc = ["mgc_detection", "mgc_keypoints", "mgc_segmentation"]
    assert table_names() == [*(f"table{number}" for number in range(1, 11)), "figure2", *mgc]
    for name in table_names():
        # No stage measures keypoints, so no row waits for a number.
        ours = f"{'MGC' if name in mgc else 'Mugs'}, ours"
        assert (ours in render(name, [])) == (name != "mgc_keypoints"), name


def test_detectors_and_segmenters_of_mgc_have_tables_of_their_own(results: Make) -> None:
    """A row's setting tells what it was measured with; printed rows of other data are not ours."""
    mgc = {"method": "mgc", "arch": "vit_s16_h8", "epochs": 800}
    detection = {**mgc, "stage": "coco_detection", "dataset": "coco2017", "metric": "box AP"}
    scenes = {**mgc, "stage": "ade20k_segmentation", "metric": "mIoU"}
    fpn = "semantic_fpn, lr=0.0002, layer decay=1"
    rows = results(
        {**detection, "setting": "mask_rcnn, 12 epochs, lr=7.5e-05, layer decay=1", "value": 41.6},
        {**detection, "setting": "12 epochs, lr=0.0002, layer decay=0.8", "value": 47.5},
        {**scenes, "dataset": "ade20k", "setting": fpn, "value": 37.0},
        {**scenes, "dataset": "ade20k", "setting": "upernet, lr=3e-05", "value": 44.6},
        {**scenes, "dataset": "voc2012", "setting": fpn, "value": 64.0},
    )
    found = render("mgc_detection", rows)
    assert cells(found, "MGC, ours")[3].startswith("41.6") and "47.5" not in found
    assert below(found, "MGC, ours")[3] == "*-0.4*"
    found = render("mgc_segmentation", rows)
    ours = cells(found, "MGC, ours")
    assert ours[3].startswith("37.0") and ours[4].startswith("64.0") and "44.6" not in found
    sixth = render("table6", rows)
    assert "47.5" in sixth and "44.6" in sixth and "41.6" not in sixth and "37.0" not in sixth
    assert not find_unplaced(build_tables(rows, table_names()), rows)


def test_ours_stands_below_the_paper_with_the_difference(results: Make) -> None:
    text = render("table1", results({}, {"setting": "cls, k=10, T=0.07", "value": 74.0}))
    assert cells(text, "| Mugs  ", "ViT-S/16", "3200") == [
        "Mugs",
        "ViT-S/16",
        "3200",
        "78.9",
        "75.6",
    ]
    ours = cells(text, "Mugs, ours", "ViT-S/16", "3200")
    assert ours[3] == "--" and ours[4].startswith("75.1 [")
    assert below(text, "Mugs, ours", "ViT-S/16", "3200")[3:] == ["--", "*-0.5*"]
    assert "run abc; cls, k=20, T=0.05; cls, k=10, T=0.07: 74.0" in text


def test_without_rows_ours_is_empty() -> None:
    text = render("table1", [])
    assert cells(text, "Mugs, ours", "ViT-L/16", "1000")[3:] == ["--", "--"]
    assert "difference" not in text


def test_a_difference_of_nothing_has_no_sign(results: Make) -> None:
    assert "*0.0*" in render("table1", results({"value": 75.56}))


def test_mini_rows_have_a_part_of_their_own(results: Make) -> None:
    mini = {"arch": "vit_mini", "dataset": "sklearn_digits", "epochs": 24}
    text = render(
        "table1", results(mini, {**mini, "method": "mugs (initialisation)", "value": 20.0})
    )
    assert "compares with nothing in the paper" in text
    assert cells(text, "Mugs (initialisation)", "ViT-mini")[2] == "0"


def test_transfer_of_the_mini_network_has_lines_of_its_own(results: Make) -> None:
    mini = {
        "arch": "vit_mini",
        "dataset": "sklearn_photo_patches",
        "epochs": 24,
        "stage": "finetune",
    }
    rows = results(
        {**mini, "setting": "best epoch"},
        {**mini, "setting": "best epoch", "method": "mugs (scratch)"},
    )
    text = render("table4", rows)
    assert (
        "patches of scikit-learn's photographs (mini): compares with nothing in the paper" in text
    )
    assert cells(text, "Mugs (scratch)", "ViT-mini")[2] == "0"
    assert "photograph" not in render("table2", rows)


def test_seeds_give_mean_spread_and_count(results: Make) -> None:
    rows = results(
        *({"seed": s, "value": v, "run_id": f"r{s}"} for s, v in enumerate((74.0, 75.0, 76.0)))
    )
    text = render("table1", rows)
    assert "75.0 ± 1.0 (n=3)" in text and "r1 (seed 1: 75.0)" in text
    assert r"75.0 $\pm$ 1.0 (n=3)" in render("table1", rows, "latex")


def test_a_setting_that_some_seeds_lack_is_not_chosen(results: Make) -> None:
    lucky = {"seed": 1, "value": 99.0, "setting": "cls, k=50, T=0.05"}
    text = render("table1", results({}, {"seed": 1, "value": 76.1}, lucky))
    assert "75.6 ± 0.7 (n=2)" in text and "99.0" not in text


def test_two_rows_for_one_cell_are_refused(results: Make) -> None:
    with pytest.raises(
        RowsError,
        match=r"line 2: 75.1 of run abc; rows.csv, line 3: 80 of run other: rows that claim",
    ):
        render("table1", results({}, {"run_id": "other", "value": 80.0}))


def test_labelled_parts_and_transfer_go_to_their_tables(results: Make) -> None:
    fine = {"stage": "finetune", "setting": "best epoch", "value": 80.0}
    few = {**fine, "setting": "1% of labels, best epoch", "value": 66.0}
    ten = {**fine, "setting": "10% of labels, best epoch", "value": 77.0}
    rows = results(fine, few, ten, {**fine, "dataset": "cifar10", "value": 99.0})
    assert cells(render("table2", rows), "Mugs, ours", "ViT-S/16")[3].startswith("80.0")
    third = cells(render("table3", rows), "Mugs, ours", "ViT-S/16")
    assert (
        third[3:5] == ["--", "--"] and third[5].startswith("66.0") and third[6].startswith("77.0")
    )
    assert cells(render("table4", rows), "Mugs, ours", "ViT-S/16")[3].startswith("99.0")
    assert not find_unplaced(build_tables(rows, table_names()), rows)


def test_variants_fill_the_ablations_and_nothing_else(results: Make) -> None:
    (main,) = results({"epochs": 100, "stage": "linear", "setting": "best epoch", "value": 76.0})
    other = replace(
        main, row=replace(main.row, run_id="x", value=75.0), variant="w/o group supervision"
    )
    weak = replace(main, row=replace(main.row, run_id="y", value=72.5), variant="weak augmentation")
    rows = [main, other, weak]
    assert cells(render("table7", rows), "w/o GDS, ours")[3].startswith("75.0")
    assert cells(render("table8", rows), "Mugs, ours", "72.5")
    first, rest = render("table1", rows).split("without a counterpart")
    assert "76.0 [" in first and "75.0 [" not in first and "72.5" not in first
    assert cells(rest, "Mugs w/o group supervision", "75.0 [")
    assert not find_unplaced(build_tables(rows, table_names()), rows)


def test_settings_that_differ_and_released_weights_have_lines_of_their_own(results: Make) -> None:
    (main,) = results({})
    bf16 = replace(
        main, row=replace(main.row, run_id="b"), differs=("pretrain.precision=bf16 (recipe: fp32)",)
    )
    theirs = replace(main, row=replace(main.row, run_id="c"), imported=True)
    text = render("table1", [theirs, bf16, main])
    assert cells(text, "Mugs, ours  ", "ViT-S/16", "3200")[4].startswith("75.1")
    assert cells(text, "Mugs, ours (pretrain.precision=bf16)")[4].startswith("75.1")
    assert cells(text, "Mugs, ours (imported weights)")
    assert "differs: pretrain.precision=bf16 (recipe: fp32)" in text


def test_unknown_data_sets_are_shown_as_such_and_unknown_stages_are_left_over(
    results: Make,
) -> None:
    rows = results({"dataset": "my_photos"}, {"stage": "guessing"})
    assert "my\\_photos (unknown data set)" in render("table1", rows)
    assert find_unplaced(build_tables(rows, table_names()), rows) == rows[1:]


def test_an_unknown_table() -> None:
    with pytest.raises(ValueError, match="table1"):
        build_table("table99", [])


def test_all_formats_are_written(results: Make, tmp_path: Path) -> None:
    assert set(write_tables([build_table("table1", results({}))], tmp_path)) == {
        "table1.md",
        "table1.tex",
        "table1.csv",
    }
    lines = (tmp_path / "table1.csv").read_text().splitlines()
    assert lines[0].startswith("table,part,group,method")
    assert any("ViT-S/16,3200,ours,knn,75.6,75.1,,1,-0.5" in line for line in lines)
    assert escape_latex('"one" and "two" of 3"') == "``one'' and ``two'' of 3\""
    assert (
        escape_latex("a_b 5% & # {^~} \\")
        == r"a\_b 5\% \& \# \{\textasciicircum{}\textasciitilde{}\} \textbackslash{}"
    )


def test_markdown_and_csv_agree_on_the_number_of_cells(results: Make) -> None:
    table = build_table("table4", results({"stage": "finetune", "dataset": "cars", "value": 93.0}))
    printed = sum(len(entry.paper) for entry in table.printed.entries)
    assert printed == 65
    assert len(render_table(table, "csv").splitlines()) == 1 + printed


def test_rows_of_every_stage_have_a_place(results: Make) -> None:
    coco = {
        "stage": "coco_detection",
        "dataset": "coco2017",
        "setting": "12 epochs, lr=0.0002, layer decay=0.8",
    }
    ade = {"stage": "ade20k_segmentation", "dataset": "ade20k", "metric": "mIoU", "value": 47.0}
    davis = {
        "stage": "davis_segmentation",
        "dataset": "davis2017",
        "arch": "vit_b16",
        "epochs": 400,
        "value": 60.0,
    }
    scratch = {
        "stage": "finetune",
        "method": "mugs (scratch)",
        "dataset": "sklearn_digits",
        "arch": "vit_mini",
    }
    rows = results(
        {**coco, "metric": "box AP", "value": 49.0},
        {**coco, "metric": "mask AP", "value": 43.5},
        {**ade, "setting": "upernet, lr=3e-05, layer decay=0.9"},
        {**ade, "setting": "linear, lr=3e-05, layer decay=1", "value": 40.0},
        *(
            {**davis, "metric": metric, "setting": f"n={n}"}
            for metric in ("J&F", "J", "F")
            for n in (7, 20)
        ),
        {"stage": "logistic", "setting": "1% of labels, lambda=0.1", "value": 66.0},
        {**scratch, "setting": "last epoch"},
    )
    tables = build_tables(rows, table_names())
    assert not find_unplaced(tables, rows)
    sixth = render("table6", rows)
    assert [cell.split(" ")[0] for cell in cells(sixth, "Mugs, ours")[3:]] == [
        "49.0",
        "43.5",
        "47.0",
        "40.0",
    ]
    assert below(sixth, "Mugs, ours")[3:] == ["*-0.8*", "*+0.5*", "*-0.4*", "--"]
    assert cells(render("table5", rows), "Mugs, ours", "ViT-B/16")[3].startswith("60.0")
    assert cells(render("table2", rows), "Mugs (scratch)", "ViT-mini")[2] == "0"


def test_the_vocabulary_has_every_stage_that_makes_rows() -> None:
    without_rows = {
        "convert",
        "coco_data",
        "ade20k_data",
        "davis_data",
        "pretrain",
        "features",
        "attention",
        "import",
    }
    assert set(STAGES) - without_rows <= set(load_vocabulary().stages)


def test_columns_of_the_same_note_share_it() -> None:
    text = render("table5", [])
    assert "J, F, Mugs ViT-B/16: the paper reports it; the value is lost" in text
    mean, *marked = cells(text, "Mugs  ", "ViT-B/16")[3:]
    assert mean == "--" and len(set(marked)) == 1 and marked[0].startswith("-- [")


DOCUMENT = r"""\documentclass{article}
\usepackage[utf8]{inputenc}
\usepackage[T1]{fontenc}
\usepackage[a4paper,margin=15mm]{geometry}
\usepackage{booktabs,caption}
\begin{document}
%s
\end{document}
"""


@pytest.mark.slow
def test_the_tables_compile(results: Callable[..., list[Result]], tmp_path: Path) -> None:
    compiler = shutil.which("pdflatex")
    if compiler is None:
        pytest.skip(
            "no pdflatex on PATH "
            "(Debian: apt-get install texlive-latex-base texlive-latex-recommended)"
        )
    (main,) = results({})
    rows = [
        main,
        *results(
            *(
                {"seed": s, "run_id": f"r_{s}", "stage": "linear", "value": 78.0 + s}
                for s in range(3)
            )
        ),
        replace(
            main,
            row=replace(main.row, run_id="b"),
            differs=("pretrain.a_b={5%} #1 (recipe: ~^$&\\)",),
        ),
        *results({"dataset": "odd_<photos>&%"}, {"dataset": "sklearn_digits", "arch": "vit_mini"}),
    ]
    text = DOCUMENT % "\n".join(
        render_table(table, "latex") for table in build_tables(rows, table_names())
    )
    (tmp_path / "tables.tex").write_text(text, encoding="utf-8")
    command = [compiler, "-interaction=nonstopmode", "-halt-on-error", "tables.tex"]
    done = subprocess.run(
        command, cwd=tmp_path, capture_output=True, text=True, errors="replace", timeout=120
    )
    assert done.returncode == 0, done.stdout[-3000:]
    overfull = [line for line in done.stdout.splitlines() if line.startswith("Overfull \\hbox")]
    assert not overfull, overfull
    assert (tmp_path / "tables.pdf").stat().st_size > 10_000


def test_with_a_factor_a_table_says_what_its_runs_cost(results: Make) -> None:
    found = results({})
    (result,) = found
    energy = {"kwh": 10.0, "measured": 8, "of": 8}
    runs = {
        result.row.run_id: FinishedRun(
            result.row.run_id, "knn", "k", {"weights": "p"}, gpu_hours=0.5
        ),
        "p": FinishedRun("p", "pretrain", "p", gpu_hours=40.0, gpus=8, energy=energy),
        "other": FinishedRun("other", "pretrain", "o", gpu_hours=99.0),
    }
    table = build_table("table1", found)
    noted = add_cost_note(table, CollectedResults(tuple(found), runs), 400)
    assert noted.notes[-1] == (
        "The 2 runs behind our numbers took 40.5 GPU-hours, 10 kWh of the GPUs (4 kg CO2 at 400"
        " g/kWh)."
    )
    runs["p"] = FinishedRun("p", "pretrain", "p", gpu_hours=40.0, gpus=8)
    noted = add_cost_note(table, CollectedResults(tuple(found), runs), 400)
    assert noted.notes[-1].endswith("40.5 GPU-hours, whose energy no GPU counted.")
    empty = build_table("table1", [])
    assert add_cost_note(empty, CollectedResults(()), 400) == empty
