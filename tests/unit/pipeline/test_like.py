"""A run takes the settings of another one and says what differs."""

from pathlib import Path

import pytest

from pipeline import config
from pipeline.spec import ConfigError
from stages import STAGES

BASE = (
    "base: {stage: knn, needs: {data: d, weights: w}, ks: [1, 2], crop: 32, "
    "resources: {hours: 3, gpu: false}}"
)


def written(folder: Path, *runs: str) -> str:
    path = folder / "ours.yaml"
    path.write_text("\n".join(["runs:", *(f"  {run}" for run in runs)]) + "\n")
    return str(path)


def test_what_is_not_said_is_taken_over(tmp_path: Path) -> None:
    one = "one: {like: base, needs: {weights: v}, ks: [5], resources: {hours: 1}}"
    runs = config.load_reproduction(
        written(tmp_path, one, BASE, "two: {like: one, crop: 16}"), STAGES
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
        written(tmp_path, BASE, "one: {like: base, ks: [5]}"),
        STAGES,
        ["base.crop=48", "base.ks=[9]", "one.resources.hours=7"],
    ).runs
    assert [vars(runs[name].config)["crop"] for name in ("base", "one")] == [48, 48]
    assert [vars(runs[name].config)["ks"] for name in ("base", "one")] == [(9,), (5,)]
    assert [runs[name].resources.hours for name in ("base", "one")] == [3, 7]


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
def test_mistakes(tmp_path: Path, run: str, words: str) -> None:
    with pytest.raises(ConfigError) as caught:
        config.load_reproduction(written(tmp_path, BASE, run), STAGES)
    assert words in str(caught.value) and "ours.yaml" in str(caught.value)


def test_of_several_the_later_one_wins(tmp_path: Path) -> None:
    other = "other: {stage: knn, needs: {data: d, weights: w}, ks: [7], crop: 64}"
    file = written(tmp_path, BASE, other, "one: {like: [other, base], resize: 80}")
    one = config.load_reproduction(file, STAGES).runs["one"].config
    assert (vars(one)["ks"], vars(one)["crop"], vars(one)["resize"]) == ((1, 2), 32, 80)
