"""The table of campaigns."""

import csv
from pathlib import Path

from chaos import COLUMNS, campaigns
from outcome import Outcome
from table_rows import merge_rows


def test_campaigns_are_found_by_their_names() -> None:
    found = [module.NAME for module in campaigns()]
    assert found == sorted(found) and len(set(found)) == len(found)
    assert {
        "2_checkpoint_writes",
        "3_disk_errors",
        "4_damage",
        "5_malicious_files",
        "6_slurm",
    } <= set(found)
    assert [module.NAME for module in campaigns(["4_"])] == ["4_damage"]
    assert campaigns(["nothing"]) == []
    assert all(callable(module.run) for module in campaigns())


def test_rows_replace_those_of_the_same_name(tmp_path: Path) -> None:
    table = tmp_path / "build" / "chaos.csv"
    old = Outcome("b", 3, ["it broke"], "note")
    for outcome in (old, Outcome("a", 1), Outcome("b", 4)):
        merge_rows(table, COLUMNS, [outcome.row()])
    with table.open(newline="") as stream:
        rows = list(csv.DictReader(stream))
    assert [(row["name"], row["trials"], row["failures"]) for row in rows] == [
        ("a", "1", "0"),
        ("b", "4", "0"),
    ]
    assert old.row()["note"] == "note; first failure: it broke"
