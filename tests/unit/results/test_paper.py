"""`results/paper` holds what the paper prints.

The printed numbers are in `reported.csv`; this file has names of columns and the count.
"""

import csv
from collections import Counter
from pathlib import Path

import pytest

from results import resources
from results.margins import compute_margins
from results.spec import load_table_spec, table_names
from results.tables import build_table

REPORTED = Path(__file__).with_name("reported.csv")
SEMI = {"semi_logreg": "logistic", "semi_finetune": "finetune"}
TRANSFER = {"iNaturalist-2018": "inat18", "iNaturalist-2019": "inat19", "Stanford-Cars": "cars"}
METRICS = {
    "AP_box": "box_ap",
    "AP_mask": "mask_ap",
    "mIoU": "miou",
    "JF_mean": "jf",
    "J_mean": "j",
    "F_mean": "f",
    "AP": "keypoint_ap",
    "AR": "keypoint_ar",
}
# Data sets of MGC's tables that have a column beside that of the main one.
BESIDE = {"Cityscapes": "cityscapes_", "VOC": "voc_"}
FROM = {
    "Fig. 2a": ("figure2", "By model size (inset of Fig. 2a)"),
    "Fig. 2b": ("figure2", "By epochs (inset of Fig. 2b)"),
    "README Table 1": ("table1", "Released checkpoints of Mugs (README)"),
    "DINOv2 Table 4": ("table1", "Released checkpoints re-evaluated by DINOv2 (its Table 4)"),
    "DINO Table 5": ("table5", "Printed by DINO (its Table 5)"),
    "iBOT Table 16": ("table5", "Printed by iBOT (its Table 16)"),
}


def reported() -> list[dict[str, str]]:
    with REPORTED.open(encoding="utf-8", newline="") as stream:
        return list(csv.DictReader(stream))


def column(record: dict[str, str]) -> str:
    """Our name of the column a reported figure, or a lead in it, is in."""
    task, data, metric = record["task"], record["dataset"], record["metric"].removeprefix("delta_")
    if task in SEMI:
        return f"{SEMI[task]}_{'10' if '10%' in data else '1'}pct"
    if task == "transfer":
        return TRANSFER.get(data, data.lower().replace("-", ""))
    return BESIDE.get(data, "") + METRICS.get(
        metric, metric.removesuffix("_top1") if task.startswith("ablation") else task
    )


def ours() -> Counter[tuple[str, ...]]:
    """Every number of the tables' files; epochs are real ones where the paper prints none,
    as in `reported.csv`.
    """
    archs = resources.read_yaml("specs", "vocabulary.yaml")["archs"]
    found: Counter[tuple[str, ...]] = Counter()
    for name in table_names():
        for cell in resources.read_csv("paper", f"{name}.csv"):
            if cell["value"]:
                released = cell["group"].startswith("Released checkpoints")
                epochs = (
                    str(int(cell["epochs"]) // 4)
                    if released
                    else cell["epochs"] or cell["pretrain_epochs"]
                )
                method, group = (
                    cell["method"].removesuffix(" (by DINOv2)"),
                    cell["group"].partition(", p")[0],
                )
                # MGC prints no number of heads.
                arch = archs[cell["arch"]].removesuffix(" (8 heads)")
                line = (group, method, arch, cell["params_m"], epochs)
                found[name, *line, cell["column"], cell["value"]] += 1
    return found


def theirs() -> Counter[tuple[str, ...]]:
    """Every reported number that belongs into a table of ours."""
    found: Counter[tuple[str, ...]] = Counter()
    for r in reported():
        table, group = FROM.get(r["table"], (r["table"].lower().replace(" ", ""), r["row_group"]))
        plotted = r["row_group"] == "plotted markers"
        repeated = r["table"] == "README Table 1" and r["epochs"] not in ("100", "300")
        other_data = r["table"] == "DINOv2 Table 4" and r["dataset"] != "ImageNet-1K"
        if table in table_names() and r["value"] and not (plotted or repeated or other_data):
            line = (group, r["method"], r["arch"], r["params_m"], r["epochs"])
            found[table, *line, column(r), r["value"]] += 1
    return found


def test_every_number_is_the_printed_one_and_none_is_missing() -> None:
    assert ours() == theirs()
    assert sum(ours().values()) == 225


def test_plotted_markers() -> None:
    archs = resources.read_yaml("specs", "vocabulary.yaml")["archs"]
    plotted = [r for r in reported() if r["row_group"] == "plotted markers"]
    mine = resources.read_csv("paper", "figure2_markers.csv")
    assert [
        (
            m["panel"],
            m["method"],
            archs.get(m["arch"], m["arch"]),
            m["params_m"],
            m["epochs"],
            m["value"],
        )
        for m in mine
    ] == [
        (r["table"][-1], r["method"], r["arch"], r["params_m"], r["epochs"], r["value"])
        for r in plotted
    ]


def test_printed_leads() -> None:
    said = Counter(
        (r["row_group"].split(",")[0], column(r), r["value"])
        for r in reported()
        if r["table"] == "text" and r["metric"].startswith("delta")
    )
    claims = {
        (g["claim"], g["column"]): g["printed"] for g in resources.read_csv("paper", "margins.csv")
    }
    assert (
        Counter((claim.split(",")[0], name, value) for (claim, name), value in claims.items())
        == said
    )


def test_leads_follow_from_the_tables_but_for_the_one_that_is_known_not_to() -> None:
    found = {
        gap.claim: gap
        for name in table_names()
        for gap in compute_margins(name, load_table_spec(name).paper, {})
    }
    wrong = [claim for claim, gap in found.items() if not gap.consistent]
    assert wrong == ["sec. 4.1.3, ViT-S/16 over iBOT"]
    assert found[wrong[0]].computed == pytest.approx(0.3) and "82.5" in found[wrong[0]].note


def test_a_lead_of_rows_that_are_there_twice_is_refused() -> None:
    with pytest.raises(ValueError, match=r"2 rows are Mugs in .*, expected one"):
        compute_margins("table1", 2 * load_table_spec("table1").paper, {})


def test_the_lead_of_ours_is_over_the_printed_baseline() -> None:
    lines = load_table_spec("table1").paper
    mine = next(
        i for i, line in enumerate(lines) if line.method == "Mugs" and line.arch == "vit_l16"
    )
    (gap,) = [
        gap
        for gap in compute_margins("table1", lines, {(mine, "knn"): 79.5})
        if "ViT-L" in gap.claim and gap.column == "knn"
    ]
    assert gap.ours == pytest.approx(1.5)


@pytest.mark.parametrize(
    ("table", "words"),
    [
        ("table2", "82.5"),
        ("table2", "84.0"),
        ("table2", "are not"),
        ("table4", "a tie with iBOT"),
        ("table5", "never cites a Table 5"),
        ("table1", "77.7"),
        ("table1", "1200 effective epochs"),
        ("table9", "1600 epochs"),
        ("table7", "labels of the columns are partly lost"),
    ],
)
def test_inconsistencies_of_the_paper_carry_a_note(table: str, words: str) -> None:
    built = build_table(table, [])
    notes = [note for entry in built.printed.entries for note in entry.notes.values()]
    assert any(words in " ".join(note.split()) for note in [*notes, *built.notes])
