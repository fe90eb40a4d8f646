"""Which files below a folder are its images, compared with torchvision's ImageFolder."""

import logging
import os
from pathlib import Path

import pytest
from PIL import Image
from torchvision.datasets import ImageFolder

from mugs.data.sources.base import SourceError
from mugs.data.sources.convert import check_whole_images
from mugs.data.sources.folder import FolderSource
from mugs.data.sources.listing import open_images
from mugs.data.sources.scan import FILE_ENDS, SMALLEST_HUGE_FILE
from stages.convert import check_images
from stages.shared.image_data import ConvertConfig, open_splits


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Two classes of two images."""
    for name in ("cat/a.jpg", "cat/z.pgm", "dog/a.jpg", "dog/b.png"):
        add_image(tmp_path / "images" / name)
    return tmp_path / "images"


def add_image(path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("L", (4, 4)).save(path)


@pytest.mark.parametrize("labeled", [True, False])
@pytest.mark.parametrize("made", [".ipynb_checkpoints", ".git", "@eaDir"])
@pytest.mark.parametrize("where", ["", "cat/"])
def test_machine_made_folders_are_skipped_and_counted(
    folder: Path, caplog: pytest.LogCaptureFixture, made: str, where: str, labeled: bool
) -> None:
    paths = open_images(folder, labeled=labeled).paths
    add_image(folder / f"{where}{made}/a-checkpoint.jpg")
    caplog.clear()
    with caplog.at_level(logging.INFO):
        source = open_images(folder, labeled=labeled)
    assert source.paths == paths == ["cat/a.jpg", "cat/z.pgm", "dog/a.jpg", "dog/b.png"]
    assert source.classes == (["cat", "dog"] if labeled else [])
    assert f"1 hidden folders and @eaDir skipped: {where}{made}" in caplog.text
    assert len(caplog.records) == 1


@pytest.mark.parametrize("labeled", [True, False])
def test_files_that_are_no_images_by_their_names_are_counted(
    folder: Path, caplog: pytest.LogCaptureFixture, labeled: bool
) -> None:
    """What macOS writes beside a.jpg on other file systems has the suffix of an image."""
    paths = open_images(folder, labeled=labeled).paths
    for name in ("cat/._a.jpg", "dog/._b.png", "cat/notes.txt", "dog/b.png.part"):
        (folder / name).write_bytes(b"\x00\x05\x16\x07")
    with caplog.at_level(logging.INFO):
        source = open_images(folder, labeled=labeled)
    assert source.paths == paths
    assert source.skipped == {"._*": 2, ".part": 1, ".txt": 1}
    assert "4 files are no images by name: 2 ._*, 1 .part, 1 .txt" in caplog.text


def test_doctor_says_how_many_files_are_skipped(folder: Path) -> None:
    (folder / "cat/._a.jpg").write_bytes(b"")
    cfg = ConvertConfig(dataset="own", num_val_images=0, train_dir=str(folder))
    said, _ = check_images(cfg, {})
    assert said.endswith("train: 1 files are no images by name: 1 ._*")


def test_images_behind_links_come_as_in_torchvision(folder: Path) -> None:
    for name in ("m.jpg", "deep/n.jpg", "deep-er/o.jpg"):
        add_image(folder.parent / "other" / name)
    (folder / "cat/more").symlink_to(folder.parent / "other")
    (folder / "cat/b.jpg").symlink_to(folder / "dog/a.jpg")
    (folder / "emu").symlink_to(folder.parent / "other/deep")
    theirs = ImageFolder(folder)
    source = FolderSource(folder)
    assert [(str(folder / p), c) for p, c in zip(source.paths, source.labels, strict=True)] == (
        theirs.samples
    )
    assert source.classes == theirs.classes and len(source) == 9


@pytest.mark.parametrize("target", ["cat", ".", "dog/.."])
@pytest.mark.parametrize("labeled", [True, False])
def test_links_in_a_circle_are_refused(folder: Path, target: str, labeled: bool) -> None:
    (folder / "cat/loop").symlink_to(folder / target)
    with pytest.raises(SourceError, match=r"loop: a link to a folder above it"):
        open_images(folder, labeled=labeled)


def test_links_to_each_other_are_refused(folder: Path) -> None:
    (folder / "cat/one").symlink_to(folder / "dog")
    (folder / "dog/two").symlink_to(folder / "cat")
    with pytest.raises(SourceError, match=r"a link to a folder above it"):
        FolderSource(folder)


def test_names_that_are_not_utf8_are_refused(folder: Path) -> None:
    """Before anything is converted: no sidecar could hold them."""
    with open(os.fsencode(folder / "cat") + b"/caf\xe9.jpg", "wb"):
        pass
    cfg = ConvertConfig(dataset="mine", train_dir=str(folder), val_dir=str(folder))
    with pytest.raises(
        SourceError, match=r"train \(.*\): 1 names .* are not UTF-8 .*: cat/caf\\xe9.jpg"
    ):
        open_splits(folder, cfg)


@pytest.mark.parametrize("kind", ["png", "jpg"])
def test_images_that_pillow_refuses_are_found_before_a_conversion(
    folder: Path, monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    """They end as they should, so their headers tell."""
    path = folder / f"dog/large.{kind}"
    Image.effect_noise((700, 700), 90).save(path, quality=100)
    source = FolderSource(folder)
    check_whole_images(source, allow_bad=("cat/z.pgm",))
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 700 * 700 // 2 - 1)
    with pytest.raises(SourceError, match=rf"dog/large.{kind}: Image size .* exceeds limit"):
        check_whole_images(FolderSource(folder))


@pytest.mark.parametrize(("kind", "ending"), list(zip(("jpg", "png"), FILE_ENDS, strict=True)))
def test_smaller_files_cannot_hold_that_many_pixels(
    tmp_path: Path, kind: str, ending: bytes
) -> None:
    """The smallest file of an even image, scaled to the number of pixels that Pillow refuses."""
    path = tmp_path / f"even.{kind}"
    image = Image.new("1" if kind == "png" else "L", (8192, 8192))
    image.save(path, optimize=True, progressive=True, compress_level=9)
    smallest = path.stat().st_size * 178_956_970 / image.width / image.height
    assert smallest > SMALLEST_HUGE_FILE[ending]
