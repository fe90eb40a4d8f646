"""Conversion of good and bad folders, read back by us and by stock FFCV."""

import io
import json
import os
import struct
import tracemalloc
import zlib
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import asdict
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from PIL import ExifTags, Image, ImageCms

from mugs.data.sources import beton
from mugs.data.sources.base import SourceError, describe_skipped
from mugs.data.sources.beton import (
    ALLOCATION,
    FIELD,
    HEADER,
    SAMPLE,
    BetonSource,
    Sidecar,
    read_sidecar,
    sidecar_path,
    write_sidecar,
)
from mugs.data.sources.changes import KINDS, describe_changes, find_changes
from mugs.data.sources.convert import convert_to_beton, verify_beton
from mugs.data.sources.decode import DecodeError, decode_rgb
from mugs.data.sources.folder import FolderSource
from mugs.data.sources.open import open_source


def jpeg(size: tuple[int, int], mode: str = "RGB", fmt: str = "JPEG", seed: int = 0) -> bytes:
    rng = np.random.default_rng(seed)
    bands = {"RGB": 3, "CMYK": 4, "L": 1}[mode]
    pixels = rng.integers(0, 255, (size[1], size[0], bands), dtype=np.uint8).squeeze(
        -1 if bands == 1 else ()
    )
    buffer = io.BytesIO()
    Image.fromarray(pixels, mode=mode).save(buffer, fmt)
    return buffer.getvalue()


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    root = tmp_path / "images"
    for label in ("cat", "dog"):
        (root / label).mkdir(parents=True)
        for i in range(4):
            (root / label / f"{i}.jpg").write_bytes(jpeg((40 + i, 30), seed=i))
    (root / "cat/cmyk.JPEG").write_bytes(jpeg((20, 20), "CMYK"))
    (root / "cat/gray.png").write_bytes(jpeg((20, 20), "L", "PNG"))
    (root / "dog/pixel.jpg").write_bytes(jpeg((1, 1)))
    return root


@pytest.fixture
def packed(folder: Path, tmp_path: Path) -> Path:
    """The folder, converted."""
    convert_to_beton(FolderSource(folder), tmp_path / "x.beton")
    return tmp_path / "x.beton"


def test_round_trip_keeps_bytes_labels_and_names(folder: Path, tmp_path: Path) -> None:
    sidecar = convert_to_beton(FolderSource(folder), tmp_path / "x.beton")
    pack, source = BetonSource(tmp_path / "x.beton"), open_source(folder)
    assert len(pack) == len(source) == 11
    assert sidecar.classes == pack.classes == ["cat", "dog"]
    for i in range(len(pack)):
        assert (pack.label(i), pack.name(i)) == (source.label(i), source.name(i))
        if source.name(i).endswith(".jpg"):
            assert pack.read(i) == source.read(i)
        assert decode_rgb(pack.read(i), "x").mode == "RGB"
    assert verify_beton(tmp_path / "x.beton") == []


def test_images_are_stored_as_they_are(folder: Path, tmp_path: Path) -> None:
    sidecar = convert_to_beton(FolderSource(folder), tmp_path / "x.beton", storage="original")
    pack, source = BetonSource(tmp_path / "x.beton"), open_source(folder)
    assert [pack.read(i) for i in range(len(pack))] == [source.read(i) for i in range(len(source))]
    assert sidecar.changes == {"gray, made RGB": 1, "CMYK, made RGB": 1}
    assert verify_beton(tmp_path / "x.beton") == []


def save(path: Path, image: Image.Image, **options: Any) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    image.save(path, **options)


def test_what_a_conversion_changed_is_counted(tmp_path: Path) -> None:
    root = tmp_path / "images"
    rgb = Image.new("RGB", (5, 4), (200, 100, 50))
    turned = Image.Exif()
    turned[ExifTags.Base.Orientation] = 6
    upright = Image.Exif()
    upright[ExifTags.Base.Orientation] = 1
    save(root / "a/plain.jpg", rgb, exif=upright)
    save(root / "a/turned.jpg", rgb, exif=turned)
    save(root / "a/turned.png", rgb, exif=turned)
    save(root / "a/wide.jpg", rgb, icc_profile=b"Display P3")
    save(
        root / "a/usual.jpg",
        rgb,
        icc_profile=ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes(),
    )
    save(root / "a/palette.png", rgb.quantize(4))
    save(root / "a/clear.png", rgb.convert("RGBA"))
    save(root / "a/clear_palette.png", rgb.quantize(4), transparency=0)
    save(root / "a/clear_color.png", rgb, transparency=(200, 100, 50))
    (root / "a/deep.ppm").write_bytes(b"P6 1 1 65535\n" + bytes(range(100, 106)))
    save(root / "a/lab.tif", rgb.convert("YCbCr"))
    save(root / "a/pages.tif", rgb, save_all=True, append_images=[rgb])
    save(root / "a/gray16.png", Image.fromarray(np.full((4, 5), 9990, np.uint16)))
    for name in ("notes.txt", "more.TXT", "._plain.jpg", "LICENSE"):
        (root / "a" / name).write_bytes(b"x")
    sidecar = convert_to_beton(FolderSource(root), tmp_path / "x.beton")
    assert sidecar.changes == {
        "gray, made RGB": 1,
        "palette, made RGB": 2,
        "transparency dropped": 3,
        "other colors, made RGB": 1,
        "16 bits, made 8": 2,
        "orientation tag not followed": 2,
        "color profile not applied": 1,
        "stored anew as JPEG": 9,
        "first of several pictures in the file": 1,
    }
    assert sidecar.skipped == {"._*": 1, ".txt": 2, "no suffix": 1}
    assert read_sidecar(tmp_path / "x.beton") == sidecar
    lines = describe_changes("train", sidecar.changes.items())
    assert lines[-2] == "train: 9 images: stored anew as JPEG"
    words = "4 files are no images by name: 1 ._*, 2 .txt, 1 no suffix"
    assert describe_skipped(sidecar.skipped) == words


def test_16_bit_color_is_counted() -> None:
    """Pillow has no mode for it, so the file is written by hand: one pixel, 6 bytes."""
    chunks = [
        (b"IHDR", struct.pack(">IIBBBBB", 1, 1, 16, 2, 0, 0, 0)),
        (b"IDAT", zlib.compress(b"\0" + bytes(range(6)))),
        (b"IEND", b""),
    ]
    data = b"\x89PNG\r\n\x1a\n" + b"".join(
        struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))
        for kind, body in chunks
    )
    with Image.open(io.BytesIO(data)) as image:
        assert image.mode == "RGB"
        assert find_changes(image, stored_anew=False) == 1 << KINDS.index("16 bits, made 8")


def test_stock_ffcv_reads_it(packed: Path) -> None:
    pytest.importorskip("ffcv", reason="ffcv is not installed")
    from ffcv.reader import Reader

    reader = Reader(str(packed))
    pack = BetonSource(packed)
    assert reader.num_samples == len(pack)
    assert reader.field_names == ["image", "label"]
    for i in range(len(pack)):
        image = decode_rgb(pack.read(i), "x")
        assert (reader.metadata["f0"]["width"][i], reader.metadata["f0"]["height"][i]) == image.size
        assert reader.metadata["f1"][i] == pack.label(i)
    assert list(reader.alloc_table["size"]) == pack.sizes


def test_stock_ffcv_loader_gives_the_pixels(tmp_path: Path) -> None:
    pytest.importorskip("ffcv", reason="ffcv is not installed")
    from ffcv.fields.basics import IntDecoder
    from ffcv.fields.rgb_image import SimpleRGBImageDecoder
    from ffcv.loader import Loader, OrderOption
    from ffcv.transforms import ToTensor

    (tmp_path / "images/a").mkdir(parents=True)
    for i in range(6):
        (tmp_path / f"images/a/{i}.jpg").write_bytes(jpeg((32, 32), seed=i))
    convert_to_beton(FolderSource(tmp_path / "images"), tmp_path / "x.beton")
    loader = Loader(
        str(tmp_path / "x.beton"),
        batch_size=3,
        num_workers=1,
        order=OrderOption.SEQUENTIAL,
        pipelines={
            "image": [SimpleRGBImageDecoder(), ToTensor()],
            "label": [IntDecoder(), ToTensor()],
        },
    )
    pack, seen = BetonSource(tmp_path / "x.beton"), 0
    for images, _ in loader:
        for image in images.numpy().copy():
            ours = np.asarray(decode_rgb(pack.read(seen), "x"))
            assert np.abs(image.astype(int) - ours).mean() < 3
            seen += 1
    assert seen == 6


def test_all_bad_files_are_named_and_nothing_is_written(folder: Path, tmp_path: Path) -> None:
    (folder / "cat/text.JPEG").write_text("this is no image")
    (folder / "dog/cut.jpg").write_bytes(jpeg((64, 64))[:600])
    with pytest.raises(SourceError) as error:
        convert_to_beton(FolderSource(folder), tmp_path / "x.beton")
    assert "cat/text.JPEG" in str(error.value)
    assert "dog/cut.jpg" in str(error.value)
    assert "allow_bad" in str(error.value)
    assert not (tmp_path / "x.beton").exists()


def write_ramp(path: Path, dtype: str) -> np.ndarray:
    """Write 4,096 values from 0 to 65,520 as one gray image; return them."""
    ramp = np.arange(64 * 64).reshape(64, 64) * 16
    Image.fromarray(ramp.astype(dtype)).save(path)
    return ramp


@pytest.mark.parametrize(
    ("name", "dtype"), [("g.png", "<u2"), ("g.ppm", "<u2"), ("g.tif", "<u2"), ("g.tif", ">u2")]
)
def test_16_bit_gray_keeps_its_picture(folder: Path, name: str, dtype: str) -> None:
    ramp = write_ramp(folder / "cat" / name, dtype)
    decoded = np.asarray(decode_rgb((folder / "cat" / name).read_bytes(), name))
    assert (decoded == (ramp // 256)[..., None]).all()
    convert_to_beton(FolderSource(folder), folder / "x.beton")
    pack = BetonSource(folder / "x.beton")
    stored = decode_rgb(pack.read(pack.sidecar.names.index(f"cat/{name}")), name)
    assert np.abs(np.asarray(stored).astype(int) - decoded).max() <= 2


@pytest.mark.parametrize(
    ("dtype", "words"), [("int32", "32-bit integers"), ("float32", "floating-point numbers")]
)
def test_pixels_of_unknown_range_are_refused(folder: Path, dtype: str, words: str) -> None:
    write_ramp(folder / "cat/deep.tiff", dtype)
    with pytest.raises(DecodeError, match=f"deep: pixels are {words}"):
        decode_rgb((folder / "cat/deep.tiff").read_bytes(), "deep")
    with pytest.raises(SourceError, match=r"1 of 12 files are not usable images: cat/deep\.tiff"):
        convert_to_beton(FolderSource(folder), folder / "x.beton")
    assert not (folder / "x.beton").exists()


def test_16_bits_of_which_12_are_used_are_refused(tmp_path: Path) -> None:
    """Cameras store 12 bits in files of 16: the upper 8 of these are nearly black."""
    ramp = np.arange(4096).reshape(64, 64)
    for name, values in (("black", ramp * 0), ("used", ramp + 1), ("not used", ramp)):
        Image.fromarray(values.astype(np.uint16)).save(tmp_path / "x.png")
        data = (tmp_path / "x.png").read_bytes()
        with (
            pytest.raises(DecodeError, match="not used: 16 bits, of which no pixel")
            if name == "not used"
            else nullcontext()
        ):
            decode_rgb(data, name)


def test_allowed_bad_files_are_left_out_and_recorded(folder: Path, tmp_path: Path) -> None:
    (folder / "cat/text.JPEG").write_text("this is no image")
    sidecar = convert_to_beton(
        FolderSource(folder), tmp_path / "x.beton", allow_bad=["cat/text.JPEG"]
    )
    assert list(sidecar.left_out) == ["cat/text.JPEG"]
    assert "cat/text.JPEG" not in sidecar.names


@pytest.mark.parametrize("images", [0, 1, 3, 7, 8, 9, 40])
def test_a_sidecar_is_written_in_pieces(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, images: int
) -> None:
    monkeypatch.setattr(beton, "_JSON_ELEMENTS", 4)
    numbers = list(range(images))
    names = [f'\u00e9"{i}\\.JPEG' for i in numbers]
    sidecar = Sidecar(["a"], names, numbers, numbers, "f", 3, "s", {"\u00e9": "x"}, labels=numbers)
    path = tmp_path / "x.beton"
    write_sidecar(path, sidecar)
    assert sidecar_path(path).read_text() == json.dumps(asdict(sidecar))
    path.write_bytes(b"123")
    assert read_sidecar(path) == sidecar


def test_a_large_sidecar_takes_little_memory(tmp_path: Path) -> None:
    numbers = list(range(10**9, 10**9 + 100_000))
    names = [f"n{i:08d}/{i}.JPEG" for i in numbers]
    sidecar = Sidecar(["a"], names, numbers, numbers, "f", 3, "s")
    tracemalloc.start()
    try:
        write_sidecar(tmp_path / "x.beton", sidecar)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    size = sidecar_path(tmp_path / "x.beton").stat().st_size
    assert size > 5e6 and peak < size / 2, (size, peak)


def test_empty_class_folder_is_named(folder: Path, tmp_path: Path) -> None:
    (folder / "emu").mkdir()
    with pytest.raises(SourceError, match="emu"):
        convert_to_beton(FolderSource(folder), tmp_path / "x.beton")


def test_a_second_conversion_does_nothing(folder: Path, packed: Path) -> None:
    before = packed.stat().st_mtime_ns
    convert_to_beton(FolderSource(folder), packed)
    assert packed.stat().st_mtime_ns == before


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (lambda path: os.truncate(path, path.stat().st_size - 100), r"x\.beton.*truncated"),
        (lambda path: sidecar_path(path).unlink(), "sidecar"),
    ],
    ids=["truncated", "no sidecar"],
)
def test_incomplete_file_is_refused(
    packed: Path, damage: Callable[[Path], None], words: str
) -> None:
    damage(packed)
    with pytest.raises(SourceError, match=words):
        open_source(packed)


def test_verify_finds_a_flipped_byte(packed: Path) -> None:
    content = bytearray(packed.read_bytes())
    content[int(BetonSource(packed).samples["image"]["data_ptr"][3]) + 50] ^= 1
    packed.write_bytes(content)
    (line,) = verify_beton(packed)
    assert f"{packed}: sample 3 (cat/3.jpg)" in line
    assert len(verify_beton(packed, every=3)) == 1 and verify_beton(packed, every=2) == []
    os.truncate(packed, 1000)
    assert "truncated" in verify_beton(packed)[0]


HOSTILE_FIELDS: dict[str, list[object]] = {
    "sizes": [[1 << 40] * 11, [-1] * 11, [True] * 11, [1.5] * 11, [9], "123456789", None],
    "names": [[1] * 11, {}, "123456789", ["x"]],
    "crc32": [["x"] * 11, [1 << 32] * 11, []],
    "labels": [[0], ["x"] * 11, {}],
    "classes": ["ab", [1, 2], None],
    "file_size": ["9", None, 1 << 70, True],
    "left_out": [[], {"x": 1}],
    "changes": [{"x": "y"}, [1]],
    "format": ["1", 2],
    "fingerprint": [1],
}


@pytest.mark.parametrize("field", HOSTILE_FIELDS)
def test_a_sidecar_with_other_values_is_refused(packed: Path, field: str) -> None:
    content = json.loads(sidecar_path(packed).read_text())
    for value in HOSTILE_FIELDS[field]:
        sidecar_path(packed).write_text(json.dumps(content | {field: value}))
        with pytest.raises(SourceError, match=packed.name):
            BetonSource(packed)


@pytest.mark.parametrize("text", ["[" * 100_000, "[]", "1" * 5000, "{}", "\ud800"])
def test_a_sidecar_that_is_none_is_refused(packed: Path, text: str) -> None:
    sidecar_path(packed).write_bytes(text.encode(errors="surrogatepass"))
    with pytest.raises(SourceError, match="not a readable sidecar"):
        BetonSource(packed)


HOSTILE_HEADERS = {
    "version": 3,
    "num_fields": 65535,
    "page_size": 1,
    "num_samples": 1 << 62,
    "alloc_table_ptr": (1 << 64) - 24 * 11,
}


@pytest.mark.parametrize("field", [*HOSTILE_HEADERS, "type", "label", "short", "empty"])
def test_a_header_with_other_values_is_refused(packed: Path, field: str) -> None:
    content = bytearray(packed.read_bytes())
    num = len(BetonSource(packed))
    if field in HOSTILE_HEADERS:
        header = np.frombuffer(content, HEADER, 1)
        header[field] = HOSTILE_HEADERS[field]
    elif field == "type":
        np.frombuffer(content, FIELD, 2, HEADER.itemsize)["type_id"][0] = 255
    elif field == "label":
        offset = HEADER.itemsize + 2 * FIELD.itemsize
        np.frombuffer(content, SAMPLE, num, offset)["label"][0] = 10**9
    else:
        content = content[: 2000 if field == "short" else 0]
    packed.write_bytes(content)
    sidecar = json.loads(sidecar_path(packed).read_text()) | {"file_size": len(content)}
    sidecar_path(packed).write_text(json.dumps(sidecar))
    with pytest.raises(SourceError, match=packed.name):
        BetonSource(packed)


@pytest.mark.parametrize("address", [(1 << 64) - 10, 1 << 63, 1 << 40, -1])
def test_ffcv_is_given_no_address_beyond_the_file(packed: Path, address: int) -> None:
    """With a size that fits, the sum of both begins at 0 again."""
    pytest.importorskip("ffcv", reason="ffcv is not installed")
    from mugs.data.loading.ffcv_loader import check_image_table

    content = bytearray(packed.read_bytes())
    whole = BetonSource(packed)
    offset = HEADER.itemsize + 2 * FIELD.itemsize
    value = address if address > 0 else len(content) - 5
    samples = np.frombuffer(content, SAMPLE, len(whole), offset)
    samples["image"]["data_ptr"][0] = value
    table_at = int(np.frombuffer(content, HEADER, 1)["alloc_table_ptr"][0])
    table = np.frombuffer(content, ALLOCATION, len(whole), table_at)
    table["ptr"][0] = value
    packed.write_bytes(content)
    source = BetonSource(packed)
    with pytest.raises(SourceError, match="its table of images is damaged"):
        check_image_table(source, SimpleNamespace(alloc_table=table))
    assert len(source.read(0)) < source.sizes[0], "read without FFCV: cut short"
    assert "sample 0" in verify_beton(packed)[0]
