"""`verify BUNDLE --certificate`: a level is reached by work, never by assertion."""

import json
import shutil
import xml.etree.ElementTree as ElementTree
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from bundle_cases import VALUES, finish_runs, make_bundle
from typer.testing import CliRunner

from pipeline.files import OverwriteError
from pipeline.spec import ConfigError
from results.certificate import NAMES, Certificate, Level
from run_stage import app
from stages.commands import certify as command
from stages.commands.certify import certify, write_certificate
from stages.commands.repeat_knn import RepeatedRun, find_image_folders, list_runs_to_repeat
from stages.commands.verify_bundle import BundleCheck, verify_bundle
from stages.shared.image_data import ConvertConfig

LATER = "2026-12-24T11:00:00+0000"


@pytest.fixture(scope="module")
def checked(tmp_path_factory: pytest.TempPathFactory) -> BundleCheck:
    """A bundle that was verified; its run root lies beside it."""
    with pytest.MonkeyPatch.context() as patch:
        return verify_bundle(make_bundle(tmp_path_factory.mktemp("bundle"), patch))


def own(folder: Path, **changes: Any) -> Path:
    """A run root in which the pretraining was repeated later, with other weights."""
    facts = {"started": LATER, "teacher": b"others", **changes}
    return finish_runs(folder / "own", **facts).root


def shifted(points: float) -> tuple[tuple[int, float], ...]:
    return tuple((k, value + points) for k, value in VALUES)


def copied(folder: Path, checked: BundleCheck) -> Path:
    shutil.copytree(checked.path.parent / "runs", folder / "copy")
    return folder / "copy"


def damaged(folder: Path) -> Path:
    root = own(folder)
    (teacher,) = root.glob("pretrain/*/teacher.safetensors")
    teacher.write_bytes(b"damage")
    return root


RUN_ROOTS: dict[str, tuple[Callable[[Path, BundleCheck], Path], int, str]] = {
    "the same numbers": (lambda folder, _: own(folder), 3, "reproduced"),
    "another seed": (
        lambda folder, _: own(folder, overrides=("pretrain.seed=7",)),
        3,
        "reproduced",
    ),
    "three points less": (
        lambda folder, _: own(folder, values=shifted(-3.0)),
        1,
        "69.300 here, 72.300 in the bundle: lower by 3.0",
    ),
    "between": (lambda folder, _: own(folder, values=shifted(-0.3)), 1, "undecided"),
    "the same weights": (
        lambda folder, _: finish_runs(folder / "own", started=LATER).root,
        4,
        "the teacher's SHA-256 is",
    ),
    "the same weights by another seed": (
        lambda folder, _: (
            finish_runs(folder / "own", started=LATER, overrides=("pretrain.seed=7",)).root
        ),
        3,
        "no backbone is equal bit by bit",
    ),
    "other settings": (
        lambda folder, _: own(folder, overrides=("pretrain.epochs=101",)),
        1,
        "no finished pretraining with the settings",
    ),
    "no k-NN": (
        lambda folder, _: own(folder, leave_out=("linear", "knn")),
        1,
        "has no k-NN yet",
    ),
    "the bundled run itself": (copied, 1, "is the bundled run itself, or a copy of it"),
    "damaged weights": (lambda folder, _: damaged(folder), 1, "differs from the SHA-256"),
}


@pytest.mark.parametrize("case", RUN_ROOTS)
def test_a_repeated_pretraining_gives_the_level_that_it_shows(
    case: str, checked: BundleCheck, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Reading the bundled reproductions takes longer than all the rest.
    monkeypatch.setattr("stages.commands.finished_results.load_references", list)
    make, level, said = RUN_ROOTS[case]
    found = certify(checked, [], make(tmp_path, checked))
    assert found.level == level, found.describe()
    assert said in "\n".join(found.describe())


def test_the_pretraining_of_another_user_is_not_ours(
    checked: BundleCheck, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("stages.commands.finished_results.load_references", list)
    monkeypatch.setattr(command, "find_foreign_owner", lambda _: "ann")
    found = certify(checked, [], own(tmp_path))
    assert found.level == 1
    assert "belongs to ann" in "\n".join(found.describe())


@pytest.mark.parametrize(
    ("here", "level", "said"),
    [
        ({"k=20": 72.3}, 2, "1 number of k-NN repeated, all equal"),
        ({"k=20": 72.25}, 2, "equal within 0.05 points"),
        ({"k=20": 71.3}, 1, "which differ: k=20: 71.3 here, 72.3 there"),
        ({}, 1, "not repeated, as a run failed"),
    ],
)
def test_a_repeated_evaluation_counts_if_its_numbers_are_equal(
    checked: BundleCheck, here: dict[str, float], level: int, said: str
) -> None:
    repeated = RepeatedRun("knn", "abc", here, {"k=20": 72.3})
    found = certify(checked, [repeated], None)
    assert found.level == level
    assert said in found.levels[1].by[0]
    # One that differs is not made good by another one.
    both = certify(checked, [repeated, RepeatedRun("knn", "b", {"k": 1.0}, {"k": 1.0})], None)
    assert both.level == level


def test_a_bundle_with_a_problem_has_no_level(checked: BundleCheck, tmp_path: Path) -> None:
    wrong = replace(checked, problems=["rows.csv differs"])
    equal = RepeatedRun("knn", "abc", {"k=20": 72.3}, {"k=20": 72.3})
    found = certify(wrong, [equal], own(tmp_path))
    assert found.level == 0
    assert found.levels[0].by == (
        "1 problem; get the bundle again from whoever made it",
        "rows.csv differs",
    )
    assert certify(wrong, [], None).levels[1].by == ("the bundle is not intact",)
    with pytest.raises(ConfigError, match="no such folder"):
        certify(checked, [], tmp_path / "nowhere")


@pytest.mark.parametrize("level", NAMES)
def test_the_certificate_is_json_and_a_badge(level: int, tmp_path: Path) -> None:
    levels = tuple(Level(number, number <= level, ("<how>",)) for number in (1, 2, 3, 4))
    certificate = Certificate("small", "ab", levels, {"git_sha": "c0ffee"})
    said = write_certificate(certificate, tmp_path / "b.zip", None, force=False)
    files = [Path(line) for line in said]
    assert [file.name for file in files] == ["b.certificate.json", "b.certificate.svg"]
    content = json.loads(files[0].read_text())
    assert (content["level"], content["name"]) == (level, NAMES[level])
    assert [each["reached"] for each in content["levels"]] == [n <= level for n in (1, 2, 3, 4)]
    badge = ElementTree.fromstring(files[1].read_text())
    assert NAMES[level] in "".join(badge.itertext())
    # Ours are replaced, those of others are not.
    write_certificate(certificate, tmp_path / "b.zip", None, force=False)
    files[1].write_text("<svg/>")
    with pytest.raises(OverwriteError, match=r"certificate\.svg"):
        write_certificate(certificate, tmp_path / "b.zip", None, force=False)


def test_why_no_evaluation_was_repeated(checked: BundleCheck) -> None:
    name = "weights/pretrain/pretrain-0/teacher.safetensors"
    there = {key: value for key, value in checked.sha256.items() if key.split("/")[0] != "weights"}
    without = certify(replace(checked, sha256=there), [], None)
    assert without.levels[1].by == (
        "k-NN was not repeated: it has no backbones (bundle --weights)",
    )
    given = certify(replace(checked, sha256={**there, name: "0"}), [], None)
    assert given.levels[1].by == ("k-NN was not repeated (--data)",)


def test_a_better_certificate_stays(tmp_path: Path) -> None:
    """Somebody checks again, and leaves an option out."""

    def write(level: int, bundle: str = "ab", *, force: bool = False) -> int:
        levels = tuple(Level(number, number <= level, ("how",)) for number in (1, 2, 3, 4))
        certificate = Certificate("small", bundle, levels, {})
        said = write_certificate(certificate, tmp_path / "b.zip", None, force=force)
        found: int = json.loads((tmp_path / "b.certificate.json").read_text())["level"]
        assert (f"level {found} was reached before" in said[0]) == (found != level)
        return found

    assert [write(2), write(1), write(3), write(2)] == [2, 2, 3, 3]
    assert write(1, force=True) == 1
    # That it is not intact is news, and so is another bundle.
    assert [write(3), write(0), write(3), write(1, "cd")] == [3, 0, 3, 1]
    # A damaged one is replaced.
    facts = tmp_path / "b.certificate.json"
    for level in (None, "3", [3]):
        facts.write_text(json.dumps({**json.loads(facts.read_text()), "level": level}))
        assert write(1, "cd") == 1


def test_runs_are_repeated_with_our_own_threads(checked: BundleCheck, tmp_path: Path) -> None:
    for split in ("train", "val"):
        (tmp_path / split).mkdir()
    greedy = [
        replace(run, config=replace(run.config, threads=10**6))
        if hasattr(run.config, "threads")
        else run
        for run in checked.runs
    ]
    runs = list_runs_to_repeat(replace(checked, runs=greedy), str(tmp_path))
    assert [run.name for run in runs] == ["imagenet", "knn"]
    assert [run.run_id for run in runs] == [
        run.run_id for run in checked.runs if run.name in ("imagenet", "knn")
    ]
    assert all(getattr(run.config, "threads", 0) < 100 for run in runs)
    assert getattr(runs[0].config, "val_dir", "") == str(tmp_path / "val")


def test_what_cannot_be_repeated_is_named(checked: BundleCheck, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="expected the folders"):
        list_runs_to_repeat(checked, str(tmp_path))
    bare = {name: digest for name, digest in checked.sha256.items() if "weights" not in name}
    with pytest.raises(ConfigError, match="bundle --weights"):
        list_runs_to_repeat(replace(checked, sha256=bare), str(tmp_path))
    config = ConvertConfig(dataset="cifar10")
    assert find_image_folders(config, str(tmp_path)) == {"root": str(tmp_path)}


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("verify", "mini", "--data", "x"), "--data: is for a bundle"),
        (("verify", "mini", "--certificate"), "--certificate: is for a bundle"),
        (("verify", "b.zip", "--deep"), "--deep: says nothing of a bundle"),
        (("verify", "b.zip", "--out", "x"), "--out: needs --certificate"),
        (("export", "x", "--out", "y", "--co2", "1"), "--co2: is for --format hub"),
    ],
)
def test_an_option_without_effect_is_refused(arguments: tuple[str, ...], said: str) -> None:
    done = CliRunner().invoke(app, arguments)
    assert done.exit_code == 2
    assert said in " ".join(done.stderr.replace("'", "").split())


def test_a_repetition_that_failed_has_no_numbers_to_compare() -> None:
    line = RepeatedRun("knn", "abc", {}, {"k=20": 72.3}).describe()
    assert "not repeated" in line and "missing" not in line
