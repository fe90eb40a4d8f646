"""Damaged, doubled and conflicting rows are refused, unknown names told,
each with file and line.
"""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest

from results.collect import CollectedResults, collect_results
from results.runs import FinishedRun, iter_with_upstream, run_from_entry, sort_by_dependency
from results.schema import ResultRow
from results.store import RowsError, read_results, write_rows
from results.variants import ReferenceReproduction, ReferenceRun, describe_variant


@pytest.fixture
def gathered(run_root: Any) -> Callable[..., CollectedResults]:
    """The collection of a run root with one k-NN run of the given rows;
    `edit` changes the text of its file.
    """

    def call(*rows: ResultRow, edit: Callable[[str], str] = str) -> CollectedResults:
        path = run_root.add("abc", "knn", rows)
        path.write_text(edit(path.read_text()))
        return collect_results(
            run_root.path, [FinishedRun("abc", "knn", "knn", rows="knn/knn-abc/rows.csv")]
        )

    return call


@pytest.mark.parametrize(
    ("change", "problem"),
    [
        ({"value": float("nan")}, "value nan is not a finite number"),
        ({"value": float("inf")}, "value inf is not a finite number"),
        ({"value": 100.1}, "value 100.1 of top1 is outside 0 to 100 %"),
        ({"value": -0.5}, "outside 0 to 100"),
        ({"unit": "percent"}, "unknown unit 'percent'"),
        ({"unit": "nats"}, "metric 'top1' has the unit 'nats', expected '%'"),
        ({"method": ""}, "method is empty"),
        ({"epochs": -1}, "epochs -1"),
    ],
)
def test_bad_values_are_refused(
    gathered: Callable[..., CollectedResults], row: ResultRow, change: dict[str, Any], problem: str
) -> None:
    found = gathered(row, replace(row, setting="other", **change))
    (line,) = found.problems
    assert line.startswith("knn/knn-abc/rows.csv, line 3: ") and problem in line
    assert [result.row for result in found.results] == [row]
    with pytest.raises(RowsError, match="line 3"):
        found.require_valid()


@pytest.mark.parametrize(
    ("edit", "problem"),
    [
        (
            lambda text: text.replace("75.1", "many"),
            "line 2: could not convert string to float: 'many'",
        ),
        (lambda text: text.replace("75.1,%,0", "75.1"), "line 2: expected 11 fields"),
        (lambda text: text.replace("75.1,%,0", "75.1,%,0,1"), "line 2: expected 11 fields"),
        (lambda text: text.replace("unit,seed", "seed,unit"), "line 1: columns"),
        (lambda text: text.replace("abc", "xyz"), "line 2: row of run xyz in the file of run abc"),
        (lambda text: "", "line 1: columns None"),
        (lambda text: text.replace('0.05"', "0.05"), "line 2: unexpected end of data"),
    ],
)
def test_malformed_files_are_refused(
    gathered: Callable[..., CollectedResults],
    row: ResultRow,
    edit: Callable[[str], str],
    problem: str,
) -> None:
    found = gathered(row, edit=edit)
    assert any(f"knn/knn-abc/rows.csv, {problem}" in line for line in found.problems), (
        found.problems
    )


def test_a_missing_file_is_named(run_root: Any) -> None:
    found = collect_results(
        run_root.path, [FinishedRun("abc", "knn", "knn", rows="knn/knn-abc/rows.csv")]
    )
    assert "knn/knn-abc/rows.csv: cannot be read" in found.problems[0]


def test_the_same_row_twice_is_refused(
    gathered: Callable[..., CollectedResults], row: ResultRow
) -> None:
    found = gathered(row, row)
    assert not found.results
    assert "rows.csv, line 2" in found.problems[0] and "rows.csv, line 3" in found.problems[0]
    assert "the same row twice" in found.problems[0]


def test_rows_that_conflict_are_refused_all(run_root: Any, row: ResultRow) -> None:
    run_root.add("abc", "knn", [row])
    run_root.add("def", "knn", [replace(row, run_id="def", value=70.0)])
    runs = [
        FinishedRun(name, "knn", "knn", rows=f"knn/knn-{name}/rows.csv") for name in ("abc", "def")
    ]
    found = collect_results(run_root.path, runs)
    assert not found.results
    assert (
        "knn/knn-abc/rows.csv, line 2: 75.1 of run abc; knn/knn-def/rows.csv, line 2: 70"
        in found.problems[0]
    )


def test_unknown_names_are_told_not_refused(
    gathered: Callable[..., CollectedResults], row: ResultRow
) -> None:
    found = gathered(
        replace(row, dataset="imagnet1k"), replace(row, stage="guess"), replace(row, metric="mIOU")
    )
    assert not found.problems and len(found.results) == 3
    first, second, third = found.unknown
    assert "line 2: unknown data set 'imagnet1k'; did you mean 'imagenet1k'?" in first
    assert "line 3: unknown stage 'guess'" in second
    assert "line 4: unknown metric 'mIOU'; did you mean 'mIoU'?" in third


def test_rows_survive_a_round_trip_and_bad_ones_are_named(run_root: Any, row: ResultRow) -> None:
    path = run_root.add("abc", "knn", [row])
    (found,), refused = read_results(path)
    assert found.row == row and not refused
    write_rows(path, [replace(row, value=float("nan")), replace(row, value=101.0)])
    found, refused = read_results(path)
    assert not found
    assert [line.rpartition("/")[2][:18] for line in refused] == [
        "rows.csv, line 2: ",
        "rows.csv, line 3: ",
    ]


def test_variants_are_read_from_the_configuration(pretraining: dict[str, Any]) -> None:
    assert describe_variant(pretraining, "vit_s16") == ""
    pretraining["mugs"]["loss_weights"] = [1.0, 0.0, 1.0]
    assert describe_variant(pretraining, "vit_s16") == "w/o local-group supervision"
    pretraining["views"] = {"weak_prob": 1.0, "num_small": 0}
    assert (
        describe_variant(pretraining, "vit_s16")
        == "w/o local-group supervision, weak augmentation, two crops"
    )
    assert describe_variant(pretraining, "vit_mini") == "w/o local-group supervision, two crops"
    # MGC always has two crops.
    assert describe_variant({"method": "mgc", "views": {"num_small": 0}}, "vit_s16_h8") == ""
    pretraining["views"] = {"weak_prob": 0.5}
    assert (
        describe_variant(pretraining, "vit_mini")
        == "w/o local-group supervision, strong augmentation"
    )


def reference(pretraining: dict[str, Any], *evaluations: dict[str, Any]) -> ReferenceReproduction:
    """The pretraining, k-NN evaluations of it on ImageNet-1K,
    and one on another data set that agrees with anything.
    """
    knn = tuple(ReferenceRun("knn", "imagenet1k", config) for config in evaluations)
    return ReferenceReproduction(
        (
            ReferenceRun("pretrain", "imagenet1k", pretraining),
            *knn,
            ReferenceRun("knn", "cifar10", {}),
        ),
    )


def test_what_differs_from_the_recipe_is_told(
    run_root: Any, row: ResultRow, pretraining: dict[str, Any]
) -> None:
    recipe = reference(pretraining, {"ks": [10, 20]}, {"ks": [5]})
    theirs = {**pretraining, "precision": "bf16", "seed": 3, "threads": 2}
    theirs["mugs"] = {"loss_weights": [0.0, 1.0, 1.0], "drop_path": 0.2}
    run_root.add("abc", "knn", [replace(row, epochs=100, seed=3)])
    runs = [
        FinishedRun(
            "abc",
            "knn",
            "knn",
            {"weights": "pre"},
            {"ks": (10, 50), "weights": "teacher"},
            rows="knn/knn-abc/rows.csv",
        ),
        FinishedRun("pre", "pretrain", "pretrain", config=theirs, runtime=frozenset({"threads"})),
    ]
    (result,) = collect_results(run_root.path, runs, [recipe]).results
    assert result.variant == "w/o instance supervision"
    assert result.differs == (
        "knn.ks=[10, 50] (recipe: [10, 20])",
        "pretrain.mugs.drop_path=0.2 (recipe: 0.1)",
        "pretrain.precision=bf16 (recipe: fp32)",
    )


@pytest.mark.parametrize(
    ("weights", "differs"),
    [("teacher", ()), ("student", ("knn.weights=student (recipe: teacher)",))],
)
def test_evaluations_of_the_student_are_told_from_those_of_the_teacher(
    run_root: Any,
    row: ResultRow,
    pretraining: dict[str, Any],
    weights: str,
    differs: tuple[str, ...],
) -> None:
    recipe = reference(pretraining, {"weights": "teacher"})
    run_root.add("abc", "knn", [replace(row, epochs=100)])
    runs = [
        FinishedRun(
            "abc",
            "knn",
            "knn",
            {"weights": "pre"},
            {"weights": weights},
            rows="knn/knn-abc/rows.csv",
        ),
        FinishedRun("pre", "pretrain", "pretrain", config=pretraining),
    ]
    (result,) = collect_results(run_root.path, runs, [recipe]).results
    assert result.differs == differs


def test_imported_weights_are_told_from_our_own(run_root: Any, row: ResultRow) -> None:
    run_root.add("abc", "knn", [row])
    runs = [
        FinishedRun("abc", "knn", "knn", {"weights": "imp"}, rows="knn/knn-abc/rows.csv"),
        FinishedRun("imp", "import", "import"),
    ]
    (result,) = collect_results(run_root.path, runs).results
    assert result.imported


def test_runs_and_their_order() -> None:
    entry = {
        "run_id": "b",
        "stage": "knn",
        "name": "k",
        "upstream": {"w": "a"},
        "provenance": {"git_sha": "5ha"},
    }
    entry |= {"outputs": {"x": {"path": "knn/k-b/x", "size": 1, "sha256": ""}}, "attempt": 1}
    run = run_from_entry(entry)
    assert (run.git_sha, run.outputs, run.folder) == ("5ha", {"x": "knn/k-b/x"}, "knn/k-b")
    first = FinishedRun("a", "pretrain", "p", {"data": "gone"})
    assert sort_by_dependency([run, first]) == [first, run]
    assert [found.run_id for found in iter_with_upstream("b", {"a": first, "b": run})] == ["b", "a"]
