"""A reproduction takes runs from another one; a run takes the settings of another one."""

import re
from pathlib import Path

import pytest

from pipeline import config
from pipeline.plan import build_plan
from pipeline.spec import ConfigError
from stages import STAGES

RUN = "{stage: convert, dataset: %s, train_dir: x, val_dir: x}"


def written(folder: Path, name: str, include: str, **runs: str) -> str:
    path = folder / f"{name}.yaml"
    lines = [
        f"name: {name}",
        f"include: {include}",
        "runs:",
        *(f"  {n}: {text}" for n, text in runs.items()),
    ]
    path.write_text("\n".join(lines) + "\n")
    return str(path)


@pytest.fixture
def base(tmp_path: Path) -> str:
    return written(tmp_path, "base", "{}", one=RUN % "one", two=RUN % "two")


def test_runs_are_taken_as_they_are(tmp_path: Path, base: str) -> None:
    found = config.load_reproduction(
        written(tmp_path, "top", f"{{{base}: [two]}}", three=RUN % "three"),
        STAGES,
        ["two.threads=7"],
    )
    assert list(found.runs) == ["two", "three"] and found.name == "top"
    assert vars(found.runs["two"].config)["threads"] == 7
    same = {run.name: run.run_id for run in build_plan(config.load_reproduction(base, STAGES))}
    assert build_plan(found)[0].run_id == same["two"]


def test_through_two_files(tmp_path: Path, base: str) -> None:
    middle = written(tmp_path, "middle", f"{{{base}: [one]}}", three=RUN % "three")
    top = written(tmp_path, "top", f"{{{middle}: [one, three]}}", four=RUN % "four")
    assert list(config.load_reproduction(top, STAGES).runs) == ["one", "three", "four"]


@pytest.mark.parametrize(
    ("include", "words"),
    [
        ("{BASE: [tow]}", "it has no run 'tow'; did you mean 'two'?"),
        ("{BASE: two}", "expected a mapping from reproductions to lists of their runs"),
        ("[BASE]", "expected a mapping from reproductions to lists of their runs"),
        ("{nowhere: [two]}", "no reproduction 'nowhere'"),
        ("{BASE: [two, two]}", "a run 'two' is included already"),
        ("{BASE: [one]}", "runs.one: a run of that name is included"),
        ("{TOP: [one]}", "reproductions include each other: "),
    ],
)
def test_mistakes(tmp_path: Path, base: str, include: str, words: str) -> None:
    include = include.replace("BASE", base).replace("TOP", str(tmp_path / "top.yaml"))
    path = written(tmp_path, "top", include, one=RUN % "other")
    with pytest.raises(ConfigError) as caught:
        config.load_reproduction(path, STAGES)
    assert (
        words in str(caught.value)
        and "\n" not in str(caught.value)
        and str(tmp_path) in str(caught.value)
    )


def test_merge_keys_and_keys_written_twice(tmp_path: Path) -> None:
    path = tmp_path / "merged.yaml"
    text = (
        "runs:\n  a: &a {stage: convert, dataset: one, threads: 3}\n  b: {<<: *a, dataset: two%s}\n"
    )
    path.write_text(text % "")
    runs = config.load_reproduction(str(path), STAGES).runs
    assert [vars(runs[n].config)["dataset"] for n in "ab"] == ["one", "two"]
    assert vars(runs["b"].config)["threads"] == 3
    text = text.replace("threads: 3", "threads: 3, resources: {hours: 1}")
    path.write_text(text % "")
    runs = config.load_reproduction(str(path), STAGES, ["b.resources.hours=2"]).runs
    assert [runs[n].resources.hours for n in "ab"] == [1, 2], (
        "an anchor is shared, an override is not"
    )
    path.write_text(text % ", dataset: three")
    with pytest.raises(ConfigError, match="key 'dataset' is written twice"):
        config.load_reproduction(str(path), STAGES)


BASE = (
    "base: {stage: knn, needs: {data: d, weights: w}, ks: [1, 2], crop: 32, "
    "resources: {hours: 3, gpu: false}}"
)


def write_runs(folder: Path, *runs: str) -> str:
    path = folder / "ours.yaml"
    path.write_text("\n".join(["runs:", *(f"  {run}" for run in runs)]) + "\n")
    return str(path)


def test_what_is_not_said_is_taken_over(tmp_path: Path) -> None:
    one = "one: {like: base, needs: {weights: v}, ks: [5], resources: {hours: 1}}"
    runs = config.load_reproduction(
        write_runs(tmp_path, one, BASE, "two: {like: one, crop: 16}"), STAGES
    ).runs
    assert runs["one"].spec.name == "knn" and runs["one"].needs == {"data": "d", "weights": "v"}
    assert (runs["one"].resources.hours, runs["one"].resources.gpu) == (1, False)
    settings = {name: vars(run.config) for name, run in runs.items()}
    assert [(s["ks"], s["crop"]) for s in settings.values()] == [
        ((5,), 32),
        ((1, 2), 32),
        ((5,), 16),
    ]


def test_overrides_reach_those_that_are_like_it(tmp_path: Path) -> None:
    runs = config.load_reproduction(
        write_runs(tmp_path, BASE, "one: {like: base, ks: [5]}"),
        STAGES,
        ["base.crop=48", "base.ks=[9]", "one.resources.hours=7"],
    ).runs
    assert [vars(runs[name].config)["crop"] for name in ("base", "one")] == [48, 48]
    assert [vars(runs[name].config)["ks"] for name in ("base", "one")] == [(9,), (5,)]
    assert [runs[name].resources.hours for name in ("base", "one")] == [3, 7]


@pytest.mark.parametrize(
    ("overrides", "resources"),
    [
        # A mapping sets the keys that it has, in any order with keys of its own.
        (["base.resources={hours: 7}"], (7, False, 1)),
        (["base.resources.nodes=2", "base.resources={hours: 7}"], (7, False, 2)),
        (["base.resources={hours: 7}", "base.resources.nodes=2"], (7, False, 2)),
        # An empty one stands for the defaults of the stage.
        (["base.resources={}"], (2, True, 1)),
    ],
)
def test_a_mapping_drops_nothing(
    tmp_path: Path, overrides: list[str], resources: tuple[float, bool, int]
) -> None:
    found = config.load_reproduction(write_runs(tmp_path, BASE), STAGES, overrides)
    need = found.runs["base"].resources
    assert (need.hours, need.gpu, need.nodes) == resources


@pytest.mark.parametrize(
    ("override", "words"),
    [
        # YAML 1.1 makes 90, 8 and 1 of these.
        ("base.resources.hours=1:30", "1:30 would be read in base 60"),
        ("base.threads=010", "010 would be read in base 8"),
        ("base.threads=on", "threads: expected a number, got 'yes or no'"),
        ("base.resources.hours=yes", "hours: expected a number, got 'yes or no'"),
    ],
)
def test_numbers_are_what_they_look_like(tmp_path: Path, override: str, words: str) -> None:
    with pytest.raises(ConfigError, match=re.escape(words)):
        config.load_reproduction(write_runs(tmp_path, BASE), STAGES, [override])


@pytest.mark.parametrize(
    ("run", "words"),
    [
        ("one: {like: bsae}", "runs.one.like: no run 'bsae'; did you mean 'base'?"),
        ("one: {like: [bsae]}", "runs.one.like: no run 'bsae'"),
        ("one: {like: [base, knn/x]}", "runs.one.like: no recipe 'knn/x'"),
        ("one: {like: one}", "runs.one.like: runs are like each other: one -> one"),
        ("one: {like: two}\n  two: {like: one}", "runs are like each other: one -> two -> one"),
        ("one: {like: base, corp: 3}", "runs.one: unknown key 'corp'; did you mean 'crop'?"),
    ],
)
def test_mistakes_with_like(tmp_path: Path, run: str, words: str) -> None:
    with pytest.raises(ConfigError) as caught:
        config.load_reproduction(write_runs(tmp_path, BASE, run), STAGES)
    assert words in str(caught.value) and "ours.yaml" in str(caught.value)


def test_of_several_the_later_one_wins(tmp_path: Path) -> None:
    other = "other: {stage: knn, needs: {data: d, weights: w}, ks: [7], crop: 64}"
    file = write_runs(tmp_path, BASE, other, "one: {like: [other, base], resize: 80}")
    one = config.load_reproduction(file, STAGES).runs["one"].config
    assert (vars(one)["ks"], vars(one)["crop"], vars(one)["resize"]) == ((1, 2), 32, 80)
