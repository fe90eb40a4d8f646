"""Several reproductions as one: each run once, under a name of its own and in its own folder."""

from collections import Counter
from pathlib import Path

import pytest

from pipeline import config, runfile
from pipeline.joining import join_runs
from pipeline.plan import build_plan
from pipeline.spec import ConfigError, StageRun, StageSpec
from stages import STAGES

DATA = {"stage": "data"}
ONE = {
    "digits": DATA,
    "main": {"stage": "train", "needs": {"data": "digits"}, "epochs": 1},
    "knn": {"stage": "test", "needs": {"data": "digits", "weights": "main"}},
}
TWO = {
    # Further down than the run that needs it, and with the text of ONE's.
    "knn": {"stage": "test", "needs": {"data": "digits", "weights": "main"}},
    "main": {"stage": "train", "needs": {"data": "digits"}, "epochs": 2},
    "digits": DATA,
    "longer": {"like": ["main"], "epochs": 3},
}


def test_each_run_once_and_names_that_tell_them_apart() -> None:
    joined, origins = join_runs({"one": ONE, "two": TWO})
    # Both `knn` are written alike, but need different runs.
    assert list(joined) == ["digits", "one-main", "one-knn", "two-knn", "two-main", "longer"]
    assert joined["two-knn"]["needs"] == {"data": "digits", "weights": "two-main"}
    assert joined["longer"]["like"] == ["two-main"]
    assert origins == {
        "digits": ("one", "digits"),
        "one-main": ("one", "main"),
        "one-knn": ("one", "knn"),
        "two-knn": ("two", "knn"),
        "two-main": ("two", "main"),
        "longer": ("two", "longer"),
    }
    assert join_runs({"one": ONE, "again": ONE})[0] == ONE


def test_what_is_no_run_yet_is_left_to_the_checks() -> None:
    circle = {"a": {"like": "b"}, "b": {"like": "a"}, "c": None, "d": {"needs": {"data": 3}}}
    assert join_runs({"one": circle})[0] == circle


def write(folder: Path, name: str, text: str) -> str:
    path = folder / f"{name}.yaml"
    path.write_text(text)
    return str(path)


@pytest.fixture
def paths(tmp_path: Path) -> list[str]:
    data = "runs:\n  digits: {stage: data}\n"
    one = "  main: {stage: train, needs: {data: digits}, epochs: 1}\n"
    two = "  main: {stage: train, needs: {data: digits}, epochs: 2}\n"
    # Written otherwise, and yet the same run as that of the first.
    same = "  third: {stage: train, needs: {data: digits}, epochs: 1, workers: 9}\n"
    return [
        write(tmp_path, "one", data + one),
        write(tmp_path, "two", data + two + same),
    ]


def plan(path: str, stages: dict[str, StageSpec], *overrides: str) -> dict[str, StageRun]:
    runs = build_plan(config.load_reproduction(path, stages, overrides))
    return {run.name: run for run in runs}


def test_ids_and_folders_are_those_of_the_parts(
    tmp_path: Path, stages: dict[str, StageSpec], paths: list[str]
) -> None:
    whole = write(tmp_path, "whole", f"all_of: [{', '.join(paths)}]\n")
    runs = plan(whole, stages)
    assert list(runs) == ["digits", "one-main", "two-main"]
    for path, name in zip(paths, ("one-main", "two-main"), strict=True):
        part = plan(path, stages)["main"]
        assert (runs[name].run_id, runs[name].key) == (part.run_id, part.key)
        folder = runfile.write_run_file(tmp_path, runs[name])
        assert runfile.read_run_file(folder).name == "main"
    changed = plan(whole, stages, "two-main.epochs=7", "third.epochs=8")
    epochs = {name: vars(run.config).get("epochs") for name, run in changed.items()}
    assert epochs == {"digits": None, "one-main": 1, "two-main": 7, "third": 8}


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("all_of: one\n", "all_of: expected a list of reproductions"),
        ("all_of: [nowhere]\n", "all_of: no reproduction 'nowhere'"),
        ("all_of: [ONE]\nruns: {digits: {stage: data}}\n", "runs.digits: a run of that name"),
        ("all_of: [ONE]\ninclude: {TWO: [digits]}\n", "all_of has a run 'digits' already"),
        ("all_of: [WHOLE]\n", "has all_of itself; list what it has"),
        ("all_of: []\n", "runs: expected a mapping"),
    ],
)
def test_mistakes(
    tmp_path: Path, stages: dict[str, StageSpec], paths: list[str], text: str, words: str
) -> None:
    whole = write(tmp_path, "whole", f"all_of: [{paths[0]}]\n")
    for name, path in (("ONE", paths[0]), ("TWO", paths[1]), ("WHOLE", whole)):
        text = text.replace(name, path)
    with pytest.raises(ConfigError) as caught:
        config.load_reproduction(write(tmp_path, "top", text), stages)
    assert words in str(caught.value) and "top.yaml" in str(caught.value)


def test_the_paper_is_everything_of_its_parts() -> None:
    """All runs of all its parts, each once, with their ids and folders."""
    parts = config.read_reproduction("paper").document["all_of"]
    keys = {run.key for part in parts for run in build_plan(config.load_reproduction(part, STAGES))}
    whole = build_plan(config.load_reproduction("paper", STAGES))
    # Two parts may call a run differently; the paper has the name of the first.
    ids = [run.run_id for run in whole]
    assert {key.rpartition("-")[2] for key in keys} == set(ids) and len(ids) == len(set(ids))
    assert {run.key for run in whole} <= keys
    # What is not the paper's, or a smaller or released form of it.
    assert set(config.list_bundled()) - set(parts) == {
        "evaluate_released",
        "figures_4_5",
        "mgc_vit_s16_coco_ep800",
        "mini",
        "mini_ablations",
        "mini_methods",
        "paper",
        "transfer_data",
    }
    assert Counter(run.stage for run in whole)["pretrain"] == 16


DATA = "  d: {stage: convert, dataset: x, num_classes: 2, train_dir: /t, val_dir: /v}\n"
FIRST = "  r0: {stage: pretrain, needs: {data: d}, arch: vit_mini, epochs: 20, batch_size: 8}\n"


def write_runs(path: Path, count: int, run: str, *, backwards: bool = False) -> str:
    """Write a reproduction whose runs each refer to the one before."""
    lines = [FIRST, *(f"  r{k}: {run.format(before=k - 1, seed=k)}\n" for k in range(1, count))]
    text = DATA + "".join(reversed(lines) if backwards else lines)
    path.write_text(f"name: x\nruns:\n{text}")
    return str(path)


def test_each_run_is_followed_once_however_many_ways_lead_to_it(tmp_path: Path) -> None:
    """The ways double from run to run, so that a file of 2 kB would take for ever."""
    twice = "{{like: [r{before}, r{before}], seed: {seed}}}"
    path = write_runs(tmp_path / "many.yaml", 60, twice)
    (tmp_path / "whole.yaml").write_text(f"name: y\nall_of: [{path}]\n")
    for name in ("many", "whole"):
        found = config.load_reproduction(str(tmp_path / f"{name}.yaml"), STAGES)
        assert len(build_plan(found)) == 61
    needs = "{{like: r0, seed: {seed}, needs: {{data: r{before}, weights: r{before}}}, seeds: [0]}}"
    path = write_runs(tmp_path / "needs.yaml", 60, needs)
    with pytest.raises(ConfigError, match="expected convert"):
        build_plan(config.load_reproduction(path, STAGES))


@pytest.mark.parametrize(
    ("run", "words"),
    [
        ("{{like: r{before}}}", "over more than 200 other runs"),
        ("{{like: r0, needs: {{data: r{before}}}}}", "need each other over too many others"),
    ],
)
def test_a_chain_of_a_thousand_runs_is_refused(tmp_path: Path, run: str, words: str) -> None:
    """Each would be one call inside another."""
    path = Path(write_runs(tmp_path / "chain.yaml", 1100, run, backwards=True))
    path.write_text(f"{path.read_text()}seeds: [0, 1]\n")
    with pytest.raises(ConfigError, match=words):
        config.load_reproduction(str(path), STAGES)


def test_a_small_file_asks_for_no_million_of_runs(tmp_path: Path) -> None:
    path = Path(
        write_runs(tmp_path / "many.yaml", 210, "{{like: r0, teacher_momentum: 0.9{seed}}}")
    )
    path.write_text(path.read_text() + f"seeds: {list(range(100))}\n")
    with pytest.raises(ConfigError, match="21001 runs with all seeds, more than 20000"):
        config.load_reproduction(str(path), STAGES)
