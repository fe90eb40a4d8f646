"""Files from elsewhere that are not what they are named: refused at once, nothing is started."""

import io
import os
import subprocess
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from mugs.data.dense.coco import decode_outline
from mugs.data.sources.base import EXTENSIONS, FORMATS, SourceError, is_name_below, open_image
from mugs.data.sources.changes import count_changes
from mugs.data.sources.convert import encode_image
from mugs.data.sources.decode import DecodeError, decode_rgb
from mugs.data.sources.listing import read_lines
from mugs.data.sources.public import read_dataset_json, read_mat

EPS = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 8 8\n%%EndComments\nshowpage\n%%EOF\n"
OTHERS = {
    "EPS": EPS,
    "PDF": b"%PDF-1.4\n",
    "PSD": b"8BPS\0\1" + bytes(40),
    "WMF": b"\xd7\xcd\xc6\x9a" + bytes(60),
    "text": b"P3 but not a picture\n",
}


@pytest.mark.parametrize("name", OTHERS)
def test_no_other_format_is_read_and_no_program_started(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    started: list[object] = []
    monkeypatch.setattr(subprocess, "check_call", lambda *args, **_: started.append(args))
    monkeypatch.setattr(subprocess, "Popen", lambda *args, **_: started.append(args))
    with pytest.raises(DecodeError, match=r"x\.jpg"):
        decode_rgb(OTHERS[name], "x.jpg")
    (tmp_path / "x.jpg").write_bytes(OTHERS[name])
    with pytest.raises((OSError, ValueError)), open_image(tmp_path / "x.jpg") as image:
        image.load()
    assert started == []


@pytest.mark.parametrize("name", ["pipe", "zero", "folder"])
def test_what_is_no_regular_file_is_not_waited_for(name: str, tmp_path: Path) -> None:
    path = {"zero": Path("/dev/zero"), "folder": tmp_path}.get(name, tmp_path / "x.jpg")
    if name == "pipe":
        os.mkfifo(path)
    with pytest.raises(OSError, match="not a regular file"), open_image(path):
        pass


def test_a_sparse_file_is_not_read_as_a_whole(tmp_path: Path) -> None:
    path = tmp_path / "x.jpg"
    path.touch()
    os.truncate(path, 1 << 40)
    with pytest.raises(OSError, match="cannot identify"), open_image(path):
        pass


@pytest.mark.parametrize("name", FORMATS)
def test_every_format_of_a_known_ending_is_read(name: str) -> None:
    buffer = io.BytesIO()
    Image.new("RGB", (9, 7), (10, 200, 30)).save(buffer, format=name)
    assert decode_rgb(buffer.getvalue(), "x").size == (9, 7)
    if name == "GIF":
        return  # files of that ending are no images to ImageFolder either
    endings = {ending for ending, of in Image.registered_extensions().items() if of == name}
    assert endings & set(EXTENSIONS)


def test_the_first_picture_of_a_gif_under_another_name_is_taken() -> None:
    first, second = Image.new("P", (9, 7), 1), Image.new("P", (9, 7), 2)
    for number, image in enumerate((first, second), 1):
        image.putpalette([0, 0, 0, 250, 0, 0, 0, 0, 250])
        assert image.getpixel((0, 0)) == number
    buffer = io.BytesIO()
    first.save(buffer, format="GIF", save_all=True, append_images=[second])
    assert decode_rgb(buffer.getvalue(), "x.JPEG").getpixel((0, 0)) == (250, 0, 0)
    assert decode_rgb(encode_image(buffer.getvalue(), "x.JPEG", 0).data, "x").size == (9, 7)
    kinds = {"first of several pictures in the file", "palette, made RGB", "stored anew as JPEG"}
    changes = encode_image(buffer.getvalue(), "x.JPEG", 0).changes
    assert kinds == count_changes(np.array([changes])).keys()


@pytest.mark.parametrize(
    ("name", "below"),
    [
        ("a/b.jpg", True),
        ("..a/b..jpg", True),
        ("../b.jpg", False),
        ("a/../../b.jpg", False),
        ("/etc/passwd", False),
        ("a\0.jpg", False),
    ],
)
def test_a_name_in_a_list_stays_below_its_folder(name: str, below: bool) -> None:
    assert is_name_below(name) == below


@pytest.mark.parametrize(
    "outline",
    [
        [[1e300, 0, 5, 5, 0, 5]],
        [[float("nan"), 0, 5, 5, 0, 5]],
        [[10**30, 0, 5, 5, 0, 5]],
        [["1", 0, 5, 5, 0, 5]],
        {"size": [6, 8], "counts": [10**9]},
        {"size": [6, 8], "counts": [-1, 49]},
        {"size": [6, 8], "counts": ["x"]},
    ],
)
def test_no_outline_is_decoded_beyond_its_image(outline: object) -> None:
    with pytest.raises(ValueError, match=r"far outside|run lengths"):
        decode_outline(outline, 6, 8)


def test_outlines_within_the_image_are_decoded() -> None:
    assert decode_outline([[0, 0, 8, 0, 8, 6, 0, 6]], 6, 8).sum() == 48
    assert decode_outline({"size": [6, 8], "counts": [8, 40]}, 6, 8).sum() == 40


def test_a_list_of_a_terabyte_is_not_read(tmp_path: Path) -> None:
    path = tmp_path / "list.txt"
    path.touch()
    os.truncate(path, 1 << 40)
    with pytest.raises(SourceError, match="cannot be read as a list"):
        read_lines(path)
    for name, read in (("a.json", read_dataset_json), ("a.mat", lambda path: read_mat(path, "x"))):
        (tmp_path / name).write_bytes(b"[" * 100_000)
        with pytest.raises(SourceError, match=f"{name}: not readable"):
            read(tmp_path / name)
