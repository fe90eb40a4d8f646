"""Random command lines, profiles, reproductions and environments, and the judge of their ends."""

import os
import shutil
from pathlib import Path
from typing import Any

import pytest
from campaign_fuzz import KINDS, judge, try_cases
from fence import fenced

from slurm.shared.exit_codes import EXIT_INTERNAL


def test_each_ends_with_a_documented_exit_code() -> None:
    complaints, seen = try_cases(20, seed=0)
    assert complaints == []
    assert {seen[kind] for kind in KINDS} == {5}


@pytest.mark.parametrize(
    ("code", "said", "words"),
    [
        (EXIT_INTERNAL, "error: internal error: x", "exit code 70"),
        ("main returned", "", "main returned"),
        ("TypeError: x", "", "TypeError"),
        (130, "", "exit code 130"),
        (1, "Traceback (most recent call last):\n", "traceback"),
        (2, " \n", "without a word"),
        (0, "", ""),
        (75, "error: Slurm does not answer", ""),
    ],
)
def test_a_wrong_end_would_be_noticed(code: object, said: str, words: str) -> None:
    found = judge(code, said)
    assert words in found and bool(found) == bool(words)


def _rename_into(folder: Path, other: Path) -> None:
    (folder / "new").rename(other)


def _write_below(_: Path, other: Path) -> None:
    descriptor = os.open(other.parent, os.O_RDONLY)
    try:
        os.mkdir(other.name, dir_fd=descriptor)
    finally:
        os.close(descriptor)


def _write_through_a_link(folder: Path, other: Path) -> None:
    (folder / "link").symlink_to(other.parent)
    (folder / "link" / other.name).write_text("x")


@pytest.mark.parametrize(
    "change",
    [
        lambda _, other: other.write_text("x"),
        lambda _, other: other.mkdir(),
        lambda _, other: other.symlink_to("x"),
        lambda _, other: os.utime(other.parent),
        lambda _, other: other.parent.chmod(0o755),
        lambda _, other: shutil.rmtree(other.parent / "kept"),
        lambda folder, other: os.link(folder / "new", other),
        _rename_into,
        _write_below,
        _write_through_a_link,
    ],
)
def test_nothing_is_changed_outside_the_fence(tmp_path: Path, change: Any) -> None:
    folder, other = tmp_path / "in", tmp_path / "out" / "other"
    kept = other.parent / "kept"
    kept.mkdir(parents=True)
    folder.mkdir()
    with fenced(folder) as refused:
        (folder / "new").write_text("x")
        (folder / "new").rename(folder / "newer")
        (folder / "newer").rename(folder / "new")
        Path(os.devnull).write_text("x")
        assert refused == []
        with pytest.raises(OSError, match="Read-only file system"):
            change(folder, other)
        assert refused in ([str(other)], [str(other.parent)], [str(kept)])
    assert os.listdir(other.parent) == ["kept"]
    other.write_text("x")
