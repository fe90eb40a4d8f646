"""Conversions that are stopped, killed, or whose files change: the file has the same bytes."""

import hashlib
import itertools
import json
import logging
import os
import random
import shutil
import signal
import subprocess
import sys
import zlib
from pathlib import Path
from types import SimpleNamespace
from typing import ClassVar, NoReturn

import numpy as np
import pytest
from PIL import Image

from mugs.data.sources import beton, convert
from mugs.data.sources.base import SourceError
from mugs.data.sources.beton import ALLOCATION, FIELD, HEADER, SAMPLE, BetonSource, sidecar_path
from mugs.data.sources.convert import convert_to_beton, encode_image, verify_beton
from mugs.data.sources.folder import FolderSource
from mugs.data.sources.parts import read_part
from pipeline.control import Interrupted

PAGE = 4096
SAVE = 15


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """300 images of 700 to 2,000 bytes in three classes; small pages, a save every SAVE images."""
    monkeypatch.setattr(beton, "PAGE", PAGE)
    monkeypatch.setattr(convert, "SAVE_SECONDS", SAVE)
    # A clock that ticks once for each image.
    monkeypatch.setattr(convert, "time", SimpleNamespace(monotonic=itertools.count().__next__))
    rng = np.random.default_rng(0)
    for index in range(300):
        side = int(rng.integers(8, 24))
        pixels = rng.integers(0, 255, (side, side, 3), dtype=np.uint8)
        name = f"{'abc'[index % 3]}/{index:03d}.{'png' if index % 7 == 0 else 'jpg'}"
        (tmp_path / "images" / name).parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(pixels).save(tmp_path / "images" / name)
    return tmp_path / "images"


def naive_beton(source: FolderSource, left_out: tuple[str, ...] = ()) -> bytes:
    """The bytes of the file, put together in memory and in one go."""
    keep = [index for index in range(len(source)) if source.name(index) not in left_out]
    samples = np.zeros(len(keep), SAMPLE)
    table = np.zeros(len(keep), ALLOCATION)
    first = -(-(HEADER.itemsize + 2 * FIELD.itemsize + samples.nbytes) // PAGE) * PAGE
    content = bytearray()
    for row, index in enumerate(keep):
        image = encode_image(source.read(index), "x", source.label(index))
        if len(content) % PAGE + len(image.data) > PAGE:
            content += bytes(-len(content) % PAGE)
        at = first + len(content)
        samples[row] = ((0, image.width, image.height, at), image.label)
        table[row] = (row, at, len(image.data))
        content += image.data
    content += bytes(-len(content) % PAGE)
    fields = np.zeros(2, FIELD)
    for field, (name, kind) in enumerate((("image", 2), ("label", 1))):
        fields[field]["type_id"] = kind
        fields[field]["name"][: len(name)] = list(name.encode())
    header = np.array((2, 2, PAGE, len(keep), first + len(content)), HEADER)
    front = header.tobytes() + fields.tobytes() + samples.tobytes()
    return front.ljust(first, b"\0") + bytes(content) + table.tobytes()


class StopError(Exception):
    """A test ends a conversion here."""


def stop_after(images: int) -> convert.PhaseCallback:
    """A report that ends the conversion after so many images of the data set."""

    def report(phase: str, done: int, total: int, size: int) -> None:
        if phase == "convert" and done >= images:
            raise StopError

    return report


def test_the_file_is_that_of_a_naive_writer(folder: Path, tmp_path: Path) -> None:
    source = FolderSource(folder)
    done = convert_to_beton(source, tmp_path / "x.beton")
    content = (tmp_path / "x.beton").read_bytes()
    assert content == naive_beton(source)
    assert done.sha256 == hashlib.sha256(content).hexdigest()
    assert done.fingerprint == source.fingerprint
    assert done.crc32[5] == zlib.crc32(BetonSource(tmp_path / "x.beton").read(5))
    assert sorted(os.listdir(tmp_path)) == ["images", "x.beton", "x.beton.json"]


@pytest.mark.parametrize("seed", range(2))
def test_stops_at_random_ends_give_the_same_bytes(folder: Path, tmp_path: Path, seed: int) -> None:
    source = FolderSource(folder)
    (folder / "b/001.jpg").write_bytes(b"no image")
    bad = ("b/001.jpg",)
    path = tmp_path / "x.beton"
    rng = random.Random(seed)
    read: list[int] = []
    for stop in sorted(rng.sample(range(1, 300), 3)):
        with pytest.raises(StopError):
            convert_to_beton(
                source, path, allow_bad=bad, threads=rng.randint(1, 8), report=stop_after(stop)
            )
        assert not path.exists()
        with (tmp_path / "x.beton.parts/data").open("ab") as stream:
            stream.write(b"torn write" * rng.randint(0, 1000))

    def report(phase: str, done: int, total: int, size: int) -> None:
        read.extend([done] if phase == "convert" else [])

    found = convert_to_beton(source, path, allow_bad=bad, report=report)
    # Only the images after the last part were read again.
    assert stop - SAVE - 2 <= read[0] <= stop
    assert read == list(range(read[0], 301))
    assert path.read_bytes() == naive_beton(source, bad)
    assert list(found.left_out) == ["b/001.jpg"]
    assert sorted(os.listdir(tmp_path)) == ["images", "x.beton", "x.beton.json"]
    fresh = convert_to_beton(source, tmp_path / "y.beton", allow_bad=bad)
    assert fresh == found


def test_kills_give_the_same_bytes(folder: Path, tmp_path: Path) -> None:
    # A process of its own, which forks: pytest has threads.
    script = """
import itertools, os, random, signal, sys
from pathlib import Path
from types import SimpleNamespace
from mugs.data.sources import beton, convert
from mugs.data.sources.folder import FolderSource
beton.PAGE, convert.SAVE_SECONDS = 4096, 15
convert.time = SimpleNamespace(monotonic=itertools.count().__next__)
folder, target = Path(sys.argv[1]), Path(sys.argv[2])
def report(phase, done, total, size):
    if (phase, done) == end:
        os.kill(os.getpid(), signal.SIGKILL)
ends = [("convert", done) for done in sorted(random.sample(range(30, 300), 3))]
for end in [*ends, ("checksum", 8192), ("", 0)]:
    child = os.fork()
    if child == 0:
        convert.convert_to_beton(FolderSource(folder), target, threads=3, report=report)
        os._exit(0)
    print(os.waitpid(child, 0)[1], len(list(target.parent.glob("x.beton.parts/*.npz"))))
"""
    arguments = [sys.executable, "-c", script, str(folder), str(tmp_path / "x.beton")]
    lines = subprocess.run(arguments, check=True, capture_output=True, text=True).stdout.split()
    assert lines[::2] == [str(int(signal.SIGKILL))] * 4 + ["0"]
    assert lines[1] != "0" == lines[-1]
    assert (tmp_path / "x.beton").read_bytes() == naive_beton(FolderSource(folder))
    assert sorted(os.listdir(tmp_path)) == ["images", "x.beton", "x.beton.json"]


def test_a_kill_between_the_file_and_its_sidecar_costs_nothing(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = FolderSource(folder)

    def die(path: Path, sidecar: object) -> NoReturn:
        raise StopError

    with monkeypatch.context() as patch:
        patch.setattr(convert, "write_sidecar", die)
        with pytest.raises(StopError):
            convert_to_beton(source, tmp_path / "x.beton")
    phases: list[str] = []
    convert_to_beton(source, tmp_path / "x.beton", report=lambda phase, *_: phases.append(phase))
    assert set(phases) == {"checksum"}
    assert (tmp_path / "x.beton").read_bytes() == naive_beton(source)


@pytest.mark.parametrize("removed", [1, 60])
def test_images_left_out_may_shorten_the_tables(folder: Path, tmp_path: Path, removed: int) -> None:
    source = FolderSource(folder)
    bad = tuple(source.name(index) for index in range(0, 2 * removed, 2))
    for name in bad:
        (folder / name).write_bytes(b"")
    shift = beton.find_first_page(300) - beton.find_first_page(300 - removed)
    assert (shift > 0) == (removed == 60)
    with pytest.raises(StopError):
        convert_to_beton(source, tmp_path / "x.beton", allow_bad=bad, report=stop_after(200))
    convert_to_beton(source, tmp_path / "x.beton", allow_bad=bad)
    assert (tmp_path / "x.beton").read_bytes() == naive_beton(source, bad)
    assert verify_beton(tmp_path / "x.beton") == []


def test_a_stop_is_saved_and_loses_nothing(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class StopAtOnce:
        attempt = 1
        steps: ClassVar[list[int]] = []

        def stop_requested(self) -> bool:
            return len(self.steps) == 49

        def may_write(self) -> bool:
            return True

        def heartbeat(self, step: int) -> None:
            self.steps.append(step)

        def saved(self, step: int, seconds: float) -> None:
            self.steps.append(-step)

        def interrupted(self, step: int) -> NoReturn:
            raise Interrupted(f"saved after {step}")

        def finish(self) -> None:
            raise AssertionError

    monkeypatch.setattr(convert, "SAVE_SECONDS", 1e9)
    with pytest.raises(Interrupted, match="saved after 50"):
        convert_to_beton(FolderSource(folder), tmp_path / "x.beton", control=StopAtOnce())
    part = read_part(tmp_path / "x.beton.parts/00000000.npz")
    assert part is not None
    assert len(part.rows) == 50


@pytest.mark.parametrize("change", ["content", "added", "removed", "renamed"])
def test_files_that_change_between_two_starts_are_noticed(
    folder: Path, tmp_path: Path, change: str, caplog: pytest.LogCaptureFixture
) -> None:
    with pytest.raises(StopError):
        convert_to_beton(FolderSource(folder), tmp_path / "x.beton", report=stop_after(250))
    name = FolderSource(folder).name(120)
    if change == "content":
        # Of the same size, so only the time tells.
        content = (folder / name).read_bytes()
        other = bytearray(content)
        other[-3] ^= 1
        (folder / name).write_bytes(other)
    elif change == "added":
        shutil.copy(folder / name, folder / name.replace(".", "_."))
    elif change == "removed":
        (folder / name).unlink()
    else:
        (folder / name).rename(folder / name.replace(".", "_."))
    source = FolderSource(folder)
    read: list[int] = []

    def report(phase: str, done: int, total: int, size: int) -> None:
        read.extend([done] if phase == "convert" else [])

    with caplog.at_level(logging.WARNING):
        convert_to_beton(source, tmp_path / "x.beton", report=report)
    assert (tmp_path / "x.beton").read_bytes() == naive_beton(source)
    assert 90 < min(read) <= 121
    assert (f"1 files changed since an earlier start: {name}" in caplog.text) == (
        change == "content"
    )


def test_bad_files_are_all_named_and_a_repair_goes_on(folder: Path, tmp_path: Path) -> None:
    source = FolderSource(folder)
    bad = [source.name(index) for index in (150, 151, 290)]
    good = {name: (folder / name).read_bytes() for name in bad}
    for name in bad:
        (folder / name).write_bytes(good[name][:300])
    for _ in range(2):
        with pytest.raises(SourceError) as error:
            convert_to_beton(source, tmp_path / "x.beton")
        assert all(name in str(error.value) for name in bad)
    for name in bad:
        (folder / name).write_bytes(good[name])
    read: list[int] = []
    convert_to_beton(source, tmp_path / "x.beton", report=lambda phase, done, *_: read.append(done))
    assert min(read) > 130
    assert (tmp_path / "x.beton").read_bytes() == naive_beton(source)


@pytest.mark.parametrize("damage", ["byte", "part", "short", "newer"])
def test_damaged_parts_are_found(folder: Path, tmp_path: Path, damage: str) -> None:
    source = FolderSource(folder)
    path = tmp_path / "x.beton"
    with pytest.raises(StopError):
        convert_to_beton(source, path, report=stop_after(200))
    parts = tmp_path / "x.beton.parts"
    if damage == "byte":
        with (parts / "data").open("r+b") as stream:
            stream.seek(os.path.getsize(parts / "data") // 2 // PAGE * PAGE + 100)
            byte = stream.read(1)
            stream.seek(-1, os.SEEK_CUR)
            stream.write(bytes([byte[0] ^ 1]))
        with pytest.raises(OSError, match="is not what an earlier start wrote"):
            convert_to_beton(source, path)
        assert not path.exists()
    elif damage == "part":
        part = sorted(parts.glob("*.npz"))[3]
        part.write_bytes(part.read_bytes()[:-100])
    elif damage == "short":
        os.truncate(parts / "data", PAGE * 8)
    else:
        # Parts of another version of Pillow may hold other bytes.
        shutil.copy(parts / "data", tmp_path / "data")
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(convert, "version", lambda package: "0.1")
            with pytest.raises(StopError):
                convert_to_beton(source, path, report=stop_after(1))
    convert_to_beton(source, path)
    assert path.read_bytes() == naive_beton(source)


def test_an_old_sidecar_does_not_count_for_a_new_file(folder: Path, tmp_path: Path) -> None:
    path = tmp_path / "x.beton"
    convert_to_beton(FolderSource(folder), path)
    (folder / "a/new.jpg").write_bytes((folder / "a/003.jpg").read_bytes())
    with pytest.raises(StopError):
        convert_to_beton(FolderSource(folder), path, report=stop_after(10))
    with pytest.raises(SourceError):
        BetonSource(path)
    convert_to_beton(FolderSource(folder), path)
    assert "a/new.jpg" in json.loads(sidecar_path(path).read_text())["names"]
    assert path.read_bytes() == naive_beton(FolderSource(folder))
