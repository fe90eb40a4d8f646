"""Remembered scans of image folders: what is reused, and what is noticed to have changed."""

import logging
import os
import shutil
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from mugs.data.sources import scan as scans
from mugs.data.sources.base import SourceError
from mugs.data.sources.convert import check_whole_images, convert_to_beton
from mugs.data.sources.folder import FolderSource
from mugs.data.sources.listing import open_images


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Two hundred images in four folders, one of them below another, and one that Pillow knows."""
    for index in range(200):
        path = tmp_path / "images" / ("a", "a-b", "a/deep", "c")[index % 4] / f"{index}.jpg"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (8, 8 + index % 7)).save(path)
    Image.new("L", (4, 4)).save(tmp_path / "images/c/gray.pgm")
    (tmp_path / "images/c/.git").mkdir()
    settle(tmp_path / "images")
    return tmp_path / "images"


def settle(root: Path) -> None:
    """Make all files and folders an hour old."""
    for path in [root, *root.rglob("*")]:
        os.utime(path, (time.time() - 3600,) * 2)


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The files that were looked at and the folders that were listed, from now on."""
    seen: list[str] = []
    look = scans.look_at_file
    scandir = os.scandir

    def note_look(path: str) -> tuple[int, int, int]:
        seen.append(path)
        return look(path)

    def note_scandir(path: str) -> object:
        seen.append(f"{path}/")
        return scandir(path)

    monkeypatch.setattr(scans, "look_at_file", note_look)
    monkeypatch.setattr(scans.os, "scandir", note_scandir)
    return seen


def look(folder: Path, memory: Path | None, *, labeled: bool = True) -> FolderSource:
    """Do what `plan` does with the images."""
    source = open_images(folder, labeled=labeled, memory=memory)
    check_whole_images(source, threads=1)
    return source


@pytest.mark.parametrize("labeled", [True, False])
def test_a_second_look_lists_and_opens_nothing(
    folder: Path, tmp_path: Path, calls: list[str], labeled: bool
) -> None:
    first = look(folder, tmp_path / "scans", labeled=labeled)
    assert len([path for path in calls if path.endswith("/")]) == 5
    assert len(calls) == 5 + 201
    calls.clear()
    second = look(folder, tmp_path / "scans", labeled=labeled)
    assert calls == []
    assert (second.paths, second.labels, second.classes) == (
        first.paths,
        first.labels,
        first.classes,
    )
    fresh = look(folder, None, labeled=labeled)
    assert fresh.paths == second.paths
    assert second.scan is not None
    assert fresh.scan is not None
    assert (second.scan.facts == fresh.scan.facts).all()
    sizes = second.scan.facts["size"][second.positions]
    assert second.fingerprint_of(sizes.tolist()) == fresh.fingerprint


def test_only_changed_folders_are_looked_at_again(
    folder: Path, tmp_path: Path, calls: list[str], caplog: pytest.LogCaptureFixture
) -> None:
    look(folder, tmp_path / "scans")
    (folder / "a/deep/2.jpg").unlink()
    shutil.copy(folder / "c/3.jpg", folder / "a/deep/new.jpg")
    shutil.copytree(folder / "c", folder / "d")
    calls.clear()
    with caplog.at_level(logging.WARNING):
        source = look(folder, tmp_path / "scans")
    assert source.classes == ["a", "a-b", "c", "d"]
    assert "a/deep/2.jpg" not in source.paths
    folders = {str(Path(path).relative_to(folder)) for path in calls if path.endswith("/")}
    assert folders == {".", "a/deep", "d"}
    files = {path for path in calls if not path.endswith("/")}
    assert {os.path.relpath(Path(path).parent, folder) for path in files} == {"a/deep", "d"}
    assert "52 added: a/deep/new.jpg, d/" in caplog.text
    assert "1 removed: a/deep/2.jpg" in caplog.text


def test_a_folder_that_may_still_change_is_not_trusted(
    folder: Path, tmp_path: Path, calls: list[str]
) -> None:
    look(folder, tmp_path / "scans")
    now = time.time_ns()
    os.utime(folder / "c", ns=(now, now))
    look(folder, tmp_path / "scans")
    # Another file of the same second gives the folder no other time on some file systems.
    shutil.copy(folder / "c/3.jpg", folder / "c/late.jpg")
    os.utime(folder / "c", ns=(now, now))
    assert "c/late.jpg" in look(folder, tmp_path / "scans").paths


def test_sampled_files_that_changed_make_all_be_looked_at(
    folder: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    look(folder, tmp_path / "scans")
    # Cut in place, so that no folder changes; few images, so that all are sampled.
    os.truncate(folder / "a/0.jpg", 100)
    with caplog.at_level(logging.WARNING), pytest.raises(SourceError, match=r"a/0\.jpg"):
        look(folder, tmp_path / "scans")
    assert "1 of 201 sampled images changed since the last scan" in caplog.text
    assert "a/0.jpg" in caplog.text


def test_images_of_other_formats_are_decoded_once(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    look(folder, tmp_path / "scans")
    source = open_images(folder, memory=tmp_path / "scans")
    assert source.find_cut_images() == []
    (folder / "c/gray.pgm").write_bytes(b"P5 4 4 255\n")
    for _ in range(2):
        with pytest.raises(SourceError, match=r"c/gray\.pgm"):
            look(folder, tmp_path / "scans")


@pytest.mark.parametrize(
    "damage",
    [
        lambda path: path.write_bytes(b"no scan"),
        lambda path: os.truncate(path, path.stat().st_size // 2),
        lambda path: np.savez(path, format=np.array(1)),
        lambda path: path.unlink(),
    ],
)
def test_a_damaged_scan_is_made_again(
    folder: Path, tmp_path: Path, damage: Callable[[Path], None]
) -> None:
    paths = look(folder, tmp_path / "scans").paths
    (file,) = (tmp_path / "scans").iterdir()
    damage(file)
    assert look(folder, tmp_path / "scans").paths == paths
    assert look(folder, tmp_path / "scans").paths == paths


def test_a_scan_of_another_folder_is_not_used(folder: Path, tmp_path: Path) -> None:
    look(folder, tmp_path / "scans")
    (file,) = (tmp_path / "scans").iterdir()
    other = tmp_path / "other"
    shutil.copytree(folder / "a", other / "x")
    shutil.copy(file, scans.scan_path(tmp_path / "scans", other))
    assert look(other, tmp_path / "scans").classes == ["x"]


def test_a_folder_for_scans_that_cannot_be_written_is_no_error(
    folder: Path, tmp_path: Path
) -> None:
    (tmp_path / "scans").write_text("a file is in the way")
    assert len(look(folder, tmp_path / "scans")) == 201


def test_a_conversion_names_what_changed_since_the_scan(
    folder: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    look(folder, tmp_path / "scans")
    source = open_images(folder, memory=tmp_path / "scans")
    # After the start, so that only reading it tells.
    Image.new("RGB", (30, 30)).save(folder / "c/7.jpg")
    with caplog.at_level(logging.WARNING):
        done = convert_to_beton(source, tmp_path / "x.beton")
    assert "1 images changed since they were scanned: c/7.jpg" in caplog.text
    assert done.fingerprint == FolderSource(folder).fingerprint


@pytest.mark.parametrize("change", ["added", "removed"])
def test_images_that_come_or_go_during_a_conversion_are_named(
    folder: Path, tmp_path: Path, change: str
) -> None:
    source = FolderSource(folder)

    def report(phase: str, done: int, total: int, size: int) -> None:
        if done == total:
            if change == "added":
                shutil.copy(folder / "c/3.jpg", folder / "c/late.jpg")
            else:
                (folder / "c/3.jpg").unlink()

    name = "c/late.jpg" if change == "added" else "c/3.jpg"
    with pytest.raises(SourceError, match=f"changed meanwhile: 1 {change}: {name}; start again"):
        convert_to_beton(source, tmp_path / "x.beton", report=report)
    assert not (tmp_path / "x.beton").exists()
    convert_to_beton(FolderSource(folder), tmp_path / "x.beton")
