"""A reproduction takes runs from another one."""

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
