"""`--seeds` and `seeds:`: a pretraining and all that needs it, once for each seed."""

from pathlib import Path
from types import SimpleNamespace

import pytest

from pipeline.plan import select_runs
from pipeline.seeds import SeedPlan, parse_seeds
from pipeline.spec import ConfigError, StageRun
from run_stage import spread_seeds
from stages.commands.clean import planned_run_ids
from stages.commands.explain import find_run, tabulate_settings
from stages.commands.reproduction import all_runs

TEXT = """
name: small
runs:
  digits: {stage: convert, train_dir: builtin:sklearn_digits, val_dir: builtin:sklearn_digits,
           dataset: sklearn_digits, num_classes: 10}
  pretrain: {like: mini/pretrain, needs: {data: digits}}
  knn: {stage: knn, needs: {data: digits, weights: pretrain}}
  few: &few
    stage: finetune
    needs: {data: digits, weights: pretrain}
    epochs: 1
    rate: {base_lr: 1.0e-3}
    layer_decay: 1.0
    batch_size: 16
    resources: {gpu: false}
  scratch: {<<: *few, weights: scratch}
"""


def plan(
    path: Path, text: str = TEXT, *, seeds: str = "", sets: list[str] | None = None
) -> list[StageRun]:
    path = path / "small.yaml"
    path.write_text(text)
    return all_runs(str(path), sets, seeds.split() or None)


def ids(runs: list[StageRun]) -> dict[str, str]:
    return {run.name: run.run_id for run in runs}


def test_the_seed_of_the_file_keeps_ids_and_the_others_are_those_of_set(tmp_path: Path) -> None:
    plain = ids(plan(tmp_path))
    runs = plan(tmp_path, seeds="0 2")
    found = ids(runs)
    assert list(found) == [
        *("digits", "pretrain", "pretrain_seed2", "knn", "knn_seed2"),
        *("few", "few_seed2", "scratch", "scratch_seed2"),
    ]
    assert {name: found[name] for name in plain} == plain
    # The same run as if each seed were set by hand: nothing is computed twice.
    by_hand = ids(plan(tmp_path, sets=["pretrain.seed=2", "scratch.seed=2"]))
    assert by_hand == {name: found.get(f"{name}_seed2", plain[name]) for name in plain}
    assert all(found[f"{name}_seed2"] != plain[name] for name in plain if name != "digits")
    by_name = {run.name: run for run in runs}
    # Evaluations of another pretraining keep their own seed; what starts at random has the new one.
    assert by_name["few_seed2"].config.seed == 0
    assert by_name["scratch_seed2"].config.seed == by_name["pretrain_seed2"].config.seed == 2
    assert by_name["knn_seed2"].needs["weights"] == found["pretrain_seed2"]
    assert by_name["knn_seed2"].key == f"knn_seed2-{found['knn_seed2']}"


def test_seeds_without_the_one_of_the_file(tmp_path: Path) -> None:
    assert [run.name for run in plan(tmp_path, seeds="3")] == [
        *("digits", "pretrain_seed3", "knn_seed3", "few_seed3", "scratch_seed3")
    ]


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("name: small", "name: small\nseeds: [0, 1]"),
        ("{like: mini/pretrain,", "{like: mini/pretrain, seeds: [0, 1],"),
    ],
)
def test_a_file_can_say_it(tmp_path: Path, old: str, new: str) -> None:
    text = TEXT.replace(old, new)
    assert ids(plan(tmp_path, text)) == ids(plan(tmp_path, seeds="0 1"))
    # The command line counts more.
    assert ids(plan(tmp_path, text, seeds="0 5")) == ids(plan(tmp_path, seeds="0 5"))


def test_settings_hold_for_all_seeds_and_names_select_them(tmp_path: Path) -> None:
    runs = plan(tmp_path, seeds="0 1 2", sets=["pretrain.epochs=3"])
    names = [run.name for run in select_runs(runs, ["pretrain"])]
    assert names == ["pretrain", "pretrain_seed1", "pretrain_seed2"]
    assert {run.config.epochs for run in select_runs(runs, ["pretrain"])} == {3}
    assert [run.name for run in select_runs(runs, ["knn_seed1"])] == ["knn_seed1"]
    # A stage means all its runs.
    assert len(select_runs(runs, ["finetune"])) == 6


def test_explain_says_where_the_seed_is_from(tmp_path: Path) -> None:
    plan(tmp_path)
    path = str(tmp_path / "small.yaml")
    sources = []
    for name in ("pretrain", "pretrain_seed1"):
        run = find_run(path, name, None, ["0", "1"])
        lines = {line[0]: line for line in tabulate_settings(path, run, None, {})}
        sources.append(lines["seed"][1:3])
        assert lines["needs.data"][2].endswith("runs.pretrain")
    assert sources == [
        ("0", "default"),
        ("1", "--seeds, or seeds of the reproduction"),
    ]


def test_clean_keeps_what_seeds_ask_for(tmp_path: Path) -> None:
    wanted = {run.run_id for run in plan(tmp_path, seeds="0 1")}
    assert wanted <= planned_run_ids(str(tmp_path / "small.yaml"), None, (), ["0", "1"])


@pytest.mark.parametrize("given", [["0", "1", "2"], ["0,1,2"], ["0, 1", "2"]])
def test_seeds_of_the_command_line(given: list[str]) -> None:
    assert parse_seeds(given) == (0, 1, 2)


@pytest.mark.parametrize(
    "given", [["0", "0"], ["-1"], ["x"], ["1.5"], [""], ["0,,1"], ["²"], ["9" * 12]]
)
def test_other_texts_are_refused(given: list[str]) -> None:
    with pytest.raises(ConfigError, match=r"^--seeds.*: expected different whole numbers"):
        parse_seeds(given)


def test_several_values_after_one_option() -> None:
    line = ["plan", "--seeds", "0", "1", "2", "mini", "--only", "knn", "--seeds", "3"]
    assert spread_seeds(line) == [
        *("plan", "--seeds", "0", "--seeds", "1", "--seeds", "2", "mini", "--only", "knn"),
        *("--seeds", "3"),
    ]
    # Numbers elsewhere stay.
    for line in (["logs", "mini", "knn", "--lines", "3"], ["plan", "--seeds", "x", "1"], []):
        assert spread_seeds(line) == line


@pytest.mark.parametrize(
    ("old", "new", "words"),
    [
        ("name: small", "name: small\nseeds: 3", "small.yaml: seeds: expected different whole"),
        ("name: small", "name: small\nseeds: [0, true]", "seeds: expected different whole"),
        ("{stage: knn,", "{stage: knn, seeds: [0, 1],", "runs.knn.seeds: a 'knn' run is not"),
        (
            "  knn:",
            "  knn_seed1: {stage: knn, needs: {data: digits}}\n  knn:",
            "two runs are named",
        ),
        (
            "scratch: {<<: *few,",
            "scratch: {<<: *few, seeds: [0, 7],",
            r"runs.scratch.seeds: \[0, 7\], but it needs runs with the seeds \[0, 1\]",
        ),
    ],
)
def test_mistakes_are_named(tmp_path: Path, old: str, new: str, words: str) -> None:
    text = TEXT.replace("{like: mini/pretrain,", "{like: mini/pretrain, seeds: [0, 1],")
    assert old in text
    with pytest.raises(ConfigError, match=words):
        plan(tmp_path, text.replace(old, new))


def test_each_pretraining_may_have_seeds_of_its_own(tmp_path: Path) -> None:
    text = """
name: small
runs:
  digits: {stage: convert, train_dir: builtin:sklearn_digits, val_dir: builtin:sklearn_digits,
           dataset: sklearn_digits, num_classes: 10}
  a: {like: mini/pretrain, needs: {data: digits}, seeds: [0, 1]}
  b: {like: a, seeds: [0, 2], epochs: 3}
  knn: {stage: knn, needs: {data: digits, weights: a}}
  other: {stage: knn, needs: {data: digits, weights: b}}
"""
    names = [run.name for run in plan(tmp_path, text)]
    assert names == [
        "digits",
        "a",
        "a_seed1",
        "b",
        "b_seed2",
        *("knn", "knn_seed1", "other", "other_seed2"),
    ]


def test_runs_with_different_seeds_cannot_be_needed_by_one_run() -> None:
    def run(needs: dict[str, str], seeds: tuple[int, ...] = ()) -> SimpleNamespace:
        config = SimpleNamespace(repeats_with_seed=lambda: bool(seeds), seed=0)
        return SimpleNamespace(needs=needs, seeds=seeds, config=config)

    runs = {"a": run({}, (0, 1)), "b": run({}, (0, 2)), "both": run({"x": "a", "y": "b"})}
    with pytest.raises(ConfigError, match=r"both.needs: runs with different seeds: a \[0, 1\], b"):
        SeedPlan("f.yaml", runs, ()).seeds_of("both")


def test_imported_weights_are_not_repeated() -> None:
    with pytest.raises(ConfigError, match="nothing here is trained from a seed"):
        all_runs("evaluate_released", None, ["0", "1"])


def test_seeds_of_a_file_that_is_included_are_not_lost_silently(tmp_path: Path) -> None:
    plan(tmp_path, TEXT.replace("name: small", "name: small\nseeds: [0, 1]"))
    outer = tmp_path / "outer.yaml"
    outer.write_text(f"name: outer\nall_of: [{tmp_path / 'small.yaml'}]\n")
    with pytest.raises(ConfigError, match="has seeds for all of its runs, which are not taken"):
        all_runs(str(outer))
