"""Rules that results and tables follow, one by one: order, ties, boundaries, missing facts."""

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from results.cells import choose_best_cell, format_difference, setting_matches
from results.collect import separate_conflicts
from results.compare import compare_cells
from results.explain import describe_commit
from results.margins import Margin, compute_margins
from results.report.costs import earlier_seconds, format_run_time, sum_costs_by_stage
from results.runs import (
    FinishedRun,
    flatten_config,
    iter_with_upstream,
    run_from_entry,
    sort_by_dependency,
)
from results.schema import Result
from results.spec import PaperRow
from results.vocabulary import load_vocabulary

Make = Callable[..., list[Result]]


def run(run_id: str, stage: str = "knn", **facts: Any) -> FinishedRun:
    return FinishedRun(run_id, stage, f"n{run_id}", **facts)


def needs(*run_ids: str) -> dict[str, str]:
    return {f"role{number}": run_id for number, run_id in enumerate(run_ids)}


def test_the_nearest_runs_come_first_and_each_once() -> None:
    """`d` needs `b` and `c`, which both need `a`; a record of `x` is missing."""
    upstream = {"a": needs(), "b": needs("a", "x"), "c": needs("a"), "d": needs("c", "b")}
    runs = {run_id: run(run_id, upstream=wanted) for run_id, wanted in upstream.items()}
    assert [found.run_id for found in iter_with_upstream("d", runs)] == ["d", "c", "b", "a"]
    assert list(iter_with_upstream("x", runs)) == []


def test_runs_follow_those_they_need_else_stage_and_name() -> None:
    found = sort_by_dependency(
        [
            run("1", "knn", upstream=needs("3")),
            run("2", "knn", upstream=needs("gone")),
            run("3", "pretrain", upstream=needs("4")),
            run("4", "convert"),
        ]
    )
    assert [each.run_id for each in found] == ["4", "2", "3", "1"]


def test_a_circle_of_damaged_records_is_shown() -> None:
    circle = [run("1", upstream=needs("2")), run("2", upstream=needs("1")), run("3")]
    assert [each.run_id for each in sort_by_dependency(circle)] == ["3", "1", "2"]


def test_settings_that_can_change_a_result() -> None:
    """A runtime setting may be a group; one whose name only begins alike is none."""
    config = {"loader": {"threads": 4, "ahead": 2}, "loader_seed": 1, "ks": (1, (2, 3)), "x": {}}
    found = run("1", config=config, runtime=frozenset({"loader", "k"}))
    assert found.science() == {"loader_seed": 1, "ks": [1, [2, 3]]}
    assert flatten_config(config)["loader.ahead"] == 2


@pytest.mark.parametrize(
    ("change", "kept"),
    [
        ({}, False),
        ({"host": "n2"}, False),
        ({"git_sha": "b"}, True),
        ({"git_dirty": True}, True),
        ({"snapshot": "t"}, True),
        ({"versions": {"torch": "2"}}, True),
    ],
)
def test_earlier_attempts_count_if_their_code_differs(change: dict[str, Any], kept: bool) -> None:
    code = {"git_sha": "a", "git_dirty": False, "snapshot": "s", "versions": {"torch": "1"}}
    entry = {"run_id": "1", "stage": "knn", "name": "k"}
    found = run_from_entry(entry | {"provenance": {**code, "earlier": [code | change]}})
    assert len(found.earlier) == kept
    assert (found.git_sha, found.git_dirty, found.versions) == ("a", False, {"torch": "1"})


@pytest.mark.parametrize(
    ("seconds", "words"),
    [
        (0, "0 s"),
        (59.4, "59 s"),
        (59.6, "1 min 00 s"),
        (3599.4, "59 min 59 s"),
        (3600, "1 h 00 min"),
        (90061, "25 h 01 min"),
    ],
)
def test_run_times(seconds: float, words: str) -> None:
    assert format_run_time(seconds) == words


@pytest.mark.parametrize(
    ("facts", "began", "earlier"),
    [
        ({}, 1_000_000_000.0, 470.0),  # the last attempt took 30 of 500 s
        ({"restarts": 0}, 1_000_000_000.0, 0.0),
        ({"finished": ""}, 1_000_000_000.0, 0.0),
        ({"finished": "today"}, 1_000_000_000.0, 0.0),
        ({}, 1_000_000_100.0, 500.0),  # the clock of another machine
        ({}, 999_999_000.0, 0.0),
        ({}, None, 0.0),
    ],
)
def test_seconds_of_attempts_before_the_last(
    tmp_path: Path, facts: dict[str, Any], began: float | None, earlier: float
) -> None:
    """The Unix time 1,000,000,000 is 2001-09-09, 01:46:40 UTC."""
    given = {"restarts": 1, "seconds": 500.0, "finished": "2001-09-09T03:47:10+0200"} | facts
    finished = run("1", **given)
    folder = tmp_path / finished.folder / "attempts"
    folder.mkdir(parents=True)
    (folder / "0001.json").write_text(json.dumps({"time": 5.0}))
    (folder / "0002.json").write_text(json.dumps({"time": began} if began else {}))
    (folder / "0003.failed.json").write_text(json.dumps({"time": 6.0}))
    assert earlier_seconds(finished, tmp_path) == earlier


def test_costs_of_a_stage_are_sums(tmp_path: Path) -> None:
    facts = [(1.5, 10.0, 1), (2.0, 20.0, 2), (4.0, 40.0, 4)]
    stages = ("pretrain", "knn", "pretrain")
    runs = [
        run(str(number), stage, gpu_hours=hours, seconds=seconds, restarts=restarts)
        for number, (stage, (hours, seconds, restarts)) in enumerate(
            zip(stages, facts, strict=True)
        )
    ]
    found = sum_costs_by_stage(runs, tmp_path)
    assert [(c.stage, c.runs, c.gpu_hours, c.seconds, c.restarts) for c in found] == [
        ("pretrain", 2, 5.5, 50.0, 5),
        ("knn", 1, 2.0, 20.0, 2),
        ("all stages", 3, 7.5, 70.0, 7),
    ]


@pytest.mark.parametrize(
    ("facts", "words"),
    [
        ({"git_sha": "c0ffee", "git_dirty": False}, "c0ffee"),
        ({"git_sha": "c0ffee", "git_dirty": True}, "c0ffee, with uncommitted changes"),
        ({"git_sha": "c0ffee"}, "c0ffee, unknown whether changed"),
        ({"git_dirty": None}, "unknown commit, unknown whether changed"),
        ({"git_sha": "a", "git_dirty": False, "snapshot": "s"}, "a, snapshot s"),
    ],
)
def test_commits_in_words(facts: dict[str, Any], words: str) -> None:
    assert describe_commit(facts) == words


@pytest.mark.parametrize(
    ("name", "title", "known"),
    [
        ("my_photos", "my_photos", False),
        ("sklearn_digits_zz_yy", ": zz yy", True),
        ("imagenet1k", "", True),
        ("imagenet1k_half", ": half", False),
    ],
)
def test_titles_of_data_sets(name: str, title: str, known: bool) -> None:
    vocabulary = load_vocabulary()
    parents = sorted((p for p in vocabulary.datasets if name.startswith(p)), key=len)
    expected = (vocabulary.datasets[parents[-1]] if parents else "") + title
    assert vocabulary.dataset_title(name) == expected
    assert vocabulary.knows_dataset(name) == known


def test_the_longest_name_is_the_parent() -> None:
    vocabulary = replace(load_vocabulary(), datasets={"a": "A", "a_b": "AB", "a_b_c": "ABC"})
    assert vocabulary.dataset_title("a_b_x_y") == "AB: x y"
    assert vocabulary.dataset_title("a_b_c") == "ABC"
    assert vocabulary.method_title("mugs (scratch)").endswith(" (scratch)")


@pytest.mark.parametrize(
    ("setting", "pattern", "matches"),
    [
        ("cls, k=20, T=0.07", "k=*", True),
        ("cls, k=20", "cls", True),
        ("cls, k=20", "k=2", False),
        ("cls", "k=*", False),
        ("Cls", "cls", False),
    ],
)
def test_parts_of_a_setting(setting: str, pattern: str, matches: bool) -> None:
    assert setting_matches(setting, pattern) == matches


def test_the_best_setting_of_most_seeds(results: Make) -> None:
    rows = results(
        *({"seed": seed, "setting": "k=10", "value": 70.0 + seed} for seed in (1, 0)),
        *({"seed": seed, "setting": "k=20", "value": 70.0 + seed} for seed in (0, 1)),
        *({"seed": seed, "setting": "k=30", "value": 60.0} for seed in (0, 1)),
        {"seed": 0, "setting": "k=50", "value": 99.0},
    )
    found = choose_best_cell(rows, ["k=?0", "k=3*", "k=5*", "cls"])
    assert (found.value, found.setting) == (70.5, "k=10")  # of equal ones the first name
    assert [result.row.seed for result in found.results] == [0, 1]
    assert found.spread == pytest.approx(0.5**0.5)
    assert found.also_reported == (("k=30", 60.0),)
    assert found.text() == "70.5 ± 0.7 (n=2)"
    single = choose_best_cell(rows[-1:])
    assert single.spread is None and single.text() == "99.0"


@pytest.mark.parametrize(
    ("value", "text"), [(0.04, "0.0"), (-0.04, "0.0"), (0.06, "+0.1"), (-1.26, "-1.3")]
)
def test_differences(value: float, text: str) -> None:
    assert format_difference(value) == text


@pytest.mark.parametrize(
    ("changes", "kept", "words"),
    [
        ([{}, {"seed": 1}], 2, ""),
        ([{}, {}], 0, "the same row twice"),
        ([{}, {"value": 1.0}, {"seed": 1}], 1, "rows that claim the same cell"),
        ([{}, {"run_id": "other"}], 0, "rows that claim the same cell"),
        ([{}, {"metric": "top5"}, {"epochs": 3}, {"dataset": "x"}, {"stage": "linear"}], 5, ""),
    ],
)
def test_rows_that_claim_one_cell(
    results: Make, changes: list[dict[str, Any]], kept: int, words: str
) -> None:
    good, conflicts = separate_conflicts(results(*changes))
    assert len(good) == kept
    assert (words in conflicts[0]) if words else (conflicts == ())


def test_the_least_lead_is_claimed(monkeypatch: pytest.MonkeyPatch) -> None:
    """Over two methods: 3.0 over one and 1.5 over the other; ours leads by 2.0 and 0.5."""
    rows = [
        PaperRow("g", method, "vit_s16", "22", epochs, "", None, {"c": value})
        for method, epochs, value in (
            ("Mugs", "100", 80.0),
            ("A", "100", 77.0),
            ("B", "100", 70.0),
            ("B", "300", 78.5),
        )
    ]
    record = {
        "table": "t", "claim": "leads", "column": "c", "group": "g", "method": "Mugs",
        "arch": "vit_s16", "epochs": "300", "over_group": "g", "over_method": "A",
        "printed": "1.5", "note": "",
    }  # fmt: skip
    records = [record, record | {"over_method": "B"}, record | {"table": "u", "over_method": "?"}]
    monkeypatch.setattr("results.margins.resources.read_csv", lambda *_: records)
    (found,) = compute_margins("t", rows, {(0, "c"): 79.0})
    assert (found.computed, found.ours, found.printed, found.consistent) == (1.5, 0.5, 1.5, True)
    assert compute_margins("t", rows, {(1, "c"): 79.0})[0].ours is None
    with pytest.raises(ValueError, match=r"0 rows are \? in 'g'"):
        compute_margins("u", rows, {})


@pytest.mark.parametrize(
    ("printed", "computed", "consistent"),
    [(None, 3.0, True), (0.4, 0.44, True), (0.4, 0.46, False), (-0.4, 0.4, False)],
)
def test_text_and_table_agree_to_a_decimal(
    printed: float | None, computed: float, consistent: bool
) -> None:
    margin = Margin("leads", "c", printed, computed, None, "")
    assert margin.consistent == consistent


def test_cells_are_compared_unrounded_and_by_setting(results: Make) -> None:
    other = {"epochs": 300, "setting": "cls, k=10, T=0.07"}
    here = results({}, {"epochs": 100}, other, {"arch": "vit_b16", "epochs": 400})
    there = results({}, {"epochs": 100, "value": 75.11}, {"epochs": 300})
    found = compare_cells(here, there, ["table1"])
    assert found.notes == ("4 cells: 1 equal, 2 different, 1 in one only.",)
    (part,) = found.parts
    shown = [[cell.text for cell in row.cells][3:] for row in part.rows]
    assert ["75.1", "75.1", "equal"] in shown and ["75.1", "--", "--"] in shown
    assert ["75.1", "75.1", "0.0"] in shown
    assert ["75.1", "75.1", "0.0 (cls, k=10, T=0.07 / cls, k=20, T=0.05)"] in shown
