"""Images in tar files, WebDataset shards and parquet files: the same as in class folders."""

import io
import os
import random
import tarfile
from collections.abc import Callable, Iterator, Sequence
from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from mugs.data.sources import packed, packed_images
from mugs.data.sources.base import SourceError
from mugs.data.sources.beton import sidecar_path
from mugs.data.sources.convert import check_whole_images, convert_to_beton
from mugs.data.sources.folder import FolderSource
from mugs.data.sources.packed import PackedSource, is_packed, open_packed
from mugs.data.sources.packed_labels import read_classes
from mugs.data.sources.tar import CHECKSUM, NAME, SIZE, TYPE, list_tar
from pipeline.control import Interrupted
from pipeline.identity import run_id
from stages.shared.image_data import ConvertConfig, open_splits

# By name, as they have no types.
pyarrow: Any = import_module("pyarrow")
parquet: Any = import_module("pyarrow.parquet")
CLASSES = ["n01440764", "n01443537", "n02084071"]
Images = dict[str, bytes]
Pack = Callable[[Path, Images], Path]


@pytest.fixture(scope="module")
def images() -> Images:
    """Sixty images by path; names such that `_` and `.` sort differently."""
    rng = np.random.default_rng(0)
    found = {}
    for index in range(60):
        name = CLASSES[index % 3]
        pixels = rng.integers(0, 255, (8 + index % 5, 9, 3), dtype=np.uint8)
        stream = io.BytesIO()
        # A PNG is stored anew, so its size in the file is another one.
        Image.fromarray(pixels).save(stream, format="PNG" if index == 7 else "JPEG")
        found[f"{name}/{name}_{index * 7}.JPEG"] = stream.getvalue()
    return found


def write_tar(path: Path, members: Sequence[tuple[str, bytes]]) -> Path:
    with tarfile.open(path, "w") as tar:
        for name, data in members:
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    return path


def shuffled(images: Images) -> list[tuple[str, bytes]]:
    pairs = list(images.items())
    random.Random(1).shuffle(pairs)
    return pairs


def label_of(path: str) -> int:
    return CLASSES.index(path.partition("/")[0])


def last(path: str) -> str:
    return path.rpartition("/")[2]


def pack_folder(folder: Path, images: Images) -> Path:
    for name, data in images.items():
        (folder / "images" / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / "images" / name).write_bytes(data)
    return folder / "images"


def pack_tar(folder: Path, images: Images) -> Path:
    return write_tar(folder / "x.tar", [("README.md", b"no image"), *shuffled(images)])


def pack_tar_of_folder(folder: Path, images: Images) -> Path:
    return write_tar(folder / "x.tar", [(f"./train/{n}", data) for n, data in shuffled(images)])


def pack_class_tars(folder: Path, images: Images) -> Path:
    (folder / "tars").mkdir(parents=True)
    for name in CLASSES:
        members = [(last(p), data) for p, data in shuffled(images) if p.startswith(name)]
        write_tar(folder / "tars" / f"{name}.tar", members)
    return folder / "tars"


def pack_tar_of_tars(folder: Path, images: Images) -> Path:
    tars = sorted(pack_class_tars(folder, images).iterdir())
    return write_tar(folder / "all.tar", [(p.name, p.read_bytes()) for p in reversed(tars)])


def pack_shards(folder: Path, images: Images) -> Path:
    pairs = shuffled(images)
    for number in range(3):
        members = []
        for path, data in pairs[number::3]:
            key = last(path).removesuffix(".JPEG")
            members += [
                (f"{key}.cls", b"%d" % label_of(path)),
                (f"{key}.JPEG", data),
                (f"{key}.json", b"{}"),
            ]
        write_tar(folder / f"train-{number:06d}.tar", members)
    return folder / "train-*.tar"


def write_parquet(path: Path, rows: Sequence[tuple[str, Any, Any]]) -> Path:
    values = {
        "image": [{"bytes": data, "path": name} for name, data, _ in rows],
        "label": [label for *_, label in rows],
    }
    parquet.write_table(pyarrow.table(values), path, row_group_size=7)
    return path


def pack_parquet(folder: Path, images: Images) -> Path:
    (folder / "hub").mkdir(parents=True)
    pairs = shuffled(images)
    for number in range(2):
        rows = []
        for path, data in pairs[number::2]:
            # The Hub puts the class behind the name.
            name = f"{last(path).removesuffix('.JPEG')}_{path.partition('/')[0]}.JPEG"
            rows.append((name, data, label_of(path)))
        write_parquet(folder / "hub" / f"train-{number:05d}-of-00002.parquet", rows)
    return folder / "hub"


PACKS: list[Pack] = [
    pack_tar,
    pack_tar_of_folder,
    pack_class_tars,
    pack_tar_of_tars,
    pack_shards,
    pack_parquet,
]


@pytest.fixture(scope="module")
def converted(
    images: Images, tmp_path_factory: pytest.TempPathFactory
) -> tuple[FolderSource, bytes, str]:
    """The images in class folders, and the two files that they are converted to."""
    folder = tmp_path_factory.mktemp("folders")
    source = FolderSource(pack_folder(folder, images))
    convert_to_beton(source, folder / "x.beton")
    return source, (folder / "x.beton").read_bytes(), sidecar_path(folder / "x.beton").read_text()


@pytest.mark.parametrize("pack", PACKS)
def test_the_same_images_give_the_same_files(
    pack: Pack, images: Images, converted: tuple[FolderSource, bytes, str], tmp_path: Path
) -> None:
    folder, beton, sidecar = converted
    path = pack(tmp_path, images)
    assert is_packed(path)
    source = open_packed(path, None, None)
    assert (source.classes, source.paths, source.labels) == (
        folder.classes,
        folder.paths,
        folder.labels,
    )
    assert source.fingerprint == folder.fingerprint
    assert [source.read(i) for i in (0, 30, 59)] == [folder.read(i) for i in (0, 30, 59)]
    assert source.locate(30).read() == folder.locate(30).read() == folder.read(30)
    check_whole_images(source, threads=1)
    convert_to_beton(source, tmp_path / "x.beton", threads=2)
    assert (tmp_path / "x.beton").read_bytes() == beton
    skipped = ', "skipped": {".md": 1}}' if pack is pack_tar else ', "skipped": {}}'
    assert sidecar_path(tmp_path / "x.beton").read_text() == sidecar.replace(
        ', "skipped": {}}', skipped
    )
    assert {p.name for p in tmp_path.iterdir() if "beton" in p.name} == {
        "x.beton",
        "x.beton.json",
    }


def test_the_run_is_the_same_wherever_the_images_are(tmp_path: Path, images: Images) -> None:
    ids = set()
    for number, pack in enumerate([pack_folder, *PACKS]):
        (tmp_path / str(number)).mkdir()
        place = str(pack(tmp_path / str(number), images))
        cfg = ConvertConfig(
            dataset="mine",
            num_classes=3,
            num_train_images=60,
            num_val_images=0,
            train_dir=place,
        )
        assert len(open_splits(tmp_path, cfg)["train"]) == 60
        ids.add(run_id("convert", cfg, {}))
    assert len(ids) == 1


@pytest.mark.parametrize("pack", [pack_tar_of_tars, pack_shards, pack_parquet])
def test_where_images_are_is_remembered(
    pack: Pack, images: Images, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = pack(tmp_path, images)
    memory = tmp_path / "memory"
    monkeypatch.setattr(packed_images, "REPORT_EVERY", 10)
    told: list[tuple[int, int]] = []
    first = open_packed(path, None, memory, lambda done, total: told.append((done, total)))
    assert told == sorted(told)
    assert len(told) > 1
    size = sum(file.stat().st_size for file in first.files)
    assert told[-1] == (size, size)
    check_whole_images(first, threads=1)
    with monkeypatch.context() as patch:
        patch.setattr(packed, "list_images", None)
        patch.setattr(PackedSource, "_look", None)
        second = open_packed(path, None, memory)
        check_whole_images(second, threads=1)
    assert second.paths == first.paths
    assert (second.index.places == first.index.places).all()
    # Another time of a file: as if nothing were known.
    os.utime(first.files[0], (1e9, 1e9))
    assert (
        open_packed(path, None, memory).index.places["size"] == first.index.places["size"]
    ).all()
    with pytest.raises(SourceError, match=r"files changed meanwhile; start again: "):
        first.check_same_files()
    (file,) = memory.glob("*.npz")
    os.truncate(file, 100)
    assert open_packed(path, None, memory).paths == first.paths


class Stopping:
    """A job that is asked to stop once it said so many times that it goes on."""

    attempt = 1

    def __init__(self, after: int) -> None:
        self.left = after

    def stop_requested(self) -> bool:
        return self.left <= 0

    def may_write(self) -> bool:
        return True

    def heartbeat(self, step: int) -> None:
        self.left -= 1

    def saved(self, step: int, seconds: float) -> None:
        return None

    def interrupted(self, step: int) -> Any:
        raise Interrupted

    def finish(self) -> None:
        return None


@pytest.mark.parametrize("pack", [pack_tar_of_tars, pack_shards, pack_parquet])
def test_a_conversion_that_is_stopped_again_and_again_gives_the_same_file(
    pack: Pack, images: Images, converted: tuple[FolderSource, bytes, str], tmp_path: Path
) -> None:
    path = pack(tmp_path, images)
    starts = 0
    for after in (0, 1, 9, 17, 1000):
        starts += 1
        try:
            convert_to_beton(
                open_packed(path, None, None), tmp_path / "x.beton", control=Stopping(after)
            )
        except Interrupted:
            continue
        break
    assert starts > 3
    assert (tmp_path / "x.beton").read_bytes() == converted[1]
    assert not list(tmp_path.glob("x.beton.*/"))


def test_a_parquet_file_that_was_replaced_is_unpacked_again(
    images: Images, converted: tuple[FolderSource, bytes, str], tmp_path: Path
) -> None:
    # Other images of the same sizes.
    swapped = {name: data[:-3] + b"\0" + data[-2:] for name, data in images.items()}
    with pytest.raises(Interrupted):
        convert_to_beton(
            open_packed(pack_parquet(tmp_path, swapped), None, None),
            tmp_path / "x.beton",
            control=Stopping(20),
        )
    assert list(tmp_path.glob("x.beton.unpacked/*"))
    (tmp_path / "hub").rename(tmp_path / "before")
    source = open_packed(pack_parquet(tmp_path, images), None, None)
    assert source.estimate_unpacked_bytes() == sum(map(len, images.values()))
    convert_to_beton(source, tmp_path / "x.beton")
    assert (tmp_path / "x.beton").read_bytes() == converted[1]


def test_images_that_are_repaired_in_a_new_file_are_noticed(images: Images, tmp_path: Path) -> None:
    path = pack_tar(tmp_path, {**images, "n01440764/cut.JPEG": b"\xff\xd8 cut short"})
    with pytest.raises(SourceError, match=r"1 of 61 files are not usable.*n01440764/cut\.JPEG"):
        convert_to_beton(open_packed(path, None, None), tmp_path / "x.beton")
    assert not (tmp_path / "x.beton").exists()
    with pytest.raises(SourceError, match=r"n01440764/cut\.JPEG"):
        check_whole_images(open_packed(path, None, None), threads=1)
    pack_tar(tmp_path, images)
    assert len(convert_to_beton(open_packed(path, None, None), tmp_path / "x.beton").names) == 60


def flat(images: Images) -> list[tuple[str, bytes]]:
    return [(f"val_{n:04d}.JPEG", data) for n, (_, data) in enumerate(sorted(images.items()))]


def write_devkit(folder: Path, wanted: Sequence[str]) -> Path:
    from scipy.io import savemat

    numbers = {"n01440764": 3, "n01443537": 1, "n02084071": 2}
    (folder / "data").mkdir(parents=True)
    synsets = np.array(
        [(numbers[name], name) for name in CLASSES],
        dtype=[("ILSVRC2012_ID", "O"), ("WNID", "O")],
    )
    savemat(folder / "data/meta.mat", {"synsets": synsets})
    lines = "".join(f"{numbers[name]}\n" for name in wanted)
    (folder / "data/ILSVRC2012_validation_ground_truth.txt").write_text(lines)
    return folder


def write_pairs(folder: Path, wanted: Sequence[str]) -> Path:
    lines = [f"val_{number:04d}.JPEG {name}\n" for number, name in enumerate(wanted)]
    (folder / "pairs.txt").write_text("".join(reversed(lines)))
    return folder / "pairs.txt"


def write_synsets(folder: Path, wanted: Sequence[str]) -> Path:
    (folder / "synsets.txt").write_text("\n".join(wanted))
    return folder / "synsets.txt"


@pytest.mark.parametrize("comment", [{}, {"comment": "of the whole archive"}])
@pytest.mark.parametrize(
    "form",
    [tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT],
    ids=["ustar", "gnu", "pax"],
)
def test_headers_are_read_as_tarfile_reads_them(
    tmp_path: Path, form: int, comment: dict[str, str]
) -> None:
    names = [
        "a/x.jpg",
        "a/größer und \udcff.jpg",
        f"a/{'b' * 90}/{'c' * 90}.jpg",
        "d/._x",
        "e/" * 40,
    ]
    if form == tarfile.USTAR_FORMAT:
        names.append(f"{'f' * 99}/y.jpg")
    with tarfile.open(tmp_path / "x.tar", "w", format=form, pax_headers=comment) as tar:
        for number, name in enumerate(names * 3):
            info = tarfile.TarInfo(name)
            info.size = (0, 1, 511, 512, 513, 10_000)[number % 6]
            info.mtime = 1e9 + 0.5 * (number % 2)
            if name.endswith("/"):
                info.type, info.size = tarfile.DIRTYPE, 0
            tar.addfile(info, io.BytesIO(bytes(info.size)))
    with tarfile.open(tmp_path / "x.tar") as tar:
        expected = [(m.name, m.offset_data, m.size) for m in tar if m.isreg()]
    assert len(expected) == 3 * (len(names) - 1)
    assert list(list_tar(tmp_path / "x.tar")) == expected


@pytest.mark.parametrize("field", [NAME, SIZE, CHECKSUM, TYPE])
def test_a_header_with_another_checksum_is_no_header(tmp_path: Path, field: slice) -> None:
    path = write_tar(tmp_path / "x.tar", [("a/1.jpg", b"x"), ("a/2.jpg", b"y"), ("a/3.jpg", b"z")])
    content = bytearray(path.read_bytes())
    content[1024 + field.start] ^= 1
    path.write_bytes(content)
    with pytest.raises(SourceError, match="no end mark at byte 1,024"):
        list(list_tar(path))


@pytest.mark.parametrize("write", [write_devkit, write_pairs, write_synsets])
def test_a_tar_without_folders_takes_its_classes_from_a_file(
    write: Callable[[Path, Sequence[str]], Path], images: Images, tmp_path: Path
) -> None:
    members = flat(images)
    wanted = [name.partition("/")[0] for name in sorted(images)]
    random.Random(2).shuffle(wanted)
    path = write_tar(tmp_path / "val.tar", members)
    folder = FolderSource(
        pack_folder(
            tmp_path,
            {f"{name}/{p}": data for (p, data), name in zip(members, wanted, strict=True)},
        )
    )
    source = open_packed(path, write(tmp_path, wanted), None)
    assert (source.paths, source.labels) == (folder.paths, folder.labels)
    assert source.fingerprint == folder.fingerprint


@pytest.mark.parametrize(
    ("lines", "message"),
    [
        ("a\nb\n", "has 2 lines for 3 images"),
        ("x.jpg a\ny.jpg b\n", "1 images have no line in it: z.jpg"),
        ("x.jpg a\ny.jpg b\nz.jpg a\nw.jpg b\n", "1 of its lines name no image: w.jpg"),
        ("x.jpg a\nx.jpg b\nz.jpg a\n", "names an image again"),
        ("x.jpg a\ny.jpg\nz.jpg a\n", "1 of its lines carry no label, others do: y.jpg"),
        ("1\n2\n3\n", "holds numbers; put meta.mat"),
        ("", "names no file"),
    ],
)
def test_files_of_labels_that_do_not_fit(tmp_path: Path, lines: str, message: str) -> None:
    (tmp_path / "labels.txt").write_text(lines)
    with pytest.raises(SourceError, match=message):
        read_classes(tmp_path / "labels.txt", ["x.jpg", "y.jpg", "z.jpg"])


def cut_in_the_middle(folder: Path, images: Images) -> Path:
    path = pack_tar(folder, images)
    os.truncate(path, path.stat().st_size // 2)
    return path


def cut_at_a_member(folder: Path, images: Images) -> Path:
    path = pack_tar(folder, images)
    with tarfile.open(path) as tar:
        member = tar.getmembers()[30]
    os.truncate(path, member.offset)
    return path


def damage_a_header(folder: Path, images: Images) -> Path:
    path = pack_tar(folder, images)
    with tarfile.open(path) as tar:
        member = tar.getmembers()[30]
    with path.open("r+b") as stream:
        stream.seek(member.offset)
        stream.write(b"\xffdamaged" * 20)
    return path


def cut_an_inner_tar(folder: Path, images: Images) -> Path:
    tars = sorted(pack_class_tars(folder, images).iterdir())
    members = [(p.name, p.read_bytes()) for p in tars]
    members[1] = (members[1][0], members[1][1][: 20 * 512])
    return write_tar(folder / "all.tar", members)


def compress(folder: Path, images: Images) -> Path:
    with tarfile.open(folder / "x.tar", "w:gz") as tar:
        tar.addfile(tarfile.TarInfo("a/b.jpg"))
    return folder / "x.tar"


def lead_outside(folder: Path, images: Images) -> Path:
    return write_tar(folder / "x.tar", [("a/../../b.jpg", b"x")])


def link(folder: Path, images: Images) -> Path:
    with tarfile.open(folder / "x.tar", "w") as tar:
        info = tarfile.TarInfo("a/b.jpg")
        info.type = tarfile.SYMTYPE
        info.linkname = "/etc/passwd"
        tar.addfile(info)
    return folder / "x.tar"


def nest_deeply(folder: Path, images: Images) -> Path:
    inner = write_tar(folder / "a.tar", [("b.tar", b"")])
    return write_tar(folder / "x.tar", [("a.tar", inner.read_bytes())])


def leave_out_classes(folder: Path, images: Images) -> Path:
    return write_tar(folder / "x.tar", flat(images))


def repeat_an_image(folder: Path, images: Images) -> Path:
    return write_tar(folder / "x.tar", [*images.items(), next(iter(images.items()))])


def hold_no_image(folder: Path, images: Images) -> Path:
    return write_tar(folder / "x.tar", [("a/readme.txt", b"x")])


def lose_a_label(folder: Path, images: Images) -> Path:
    return write_tar(folder / "x.tar", [("a.jpg", b"x"), ("b.jpg", b"x"), ("b.cls", b"0")])


def lose_an_image(folder: Path, images: Images) -> Path:
    return write_tar(folder / "x.tar", [("a.jpg", b"x"), ("a.cls", b"0"), ("b.cls", b"0")])


def hold_no_number(folder: Path, images: Images) -> Path:
    return write_tar(folder / "x.tar", [("a.jpg", b"x"), ("a.cls", b"cat")])


def unsort_a_shard(folder: Path, images: Images) -> Path:
    members = [("a.jpg", b"x"), ("b.jpg", b"x"), ("a.cls", b"0"), ("b.cls", b"0")]
    return write_tar(folder / "x.tar", members)


def lose_a_shard(folder: Path, images: Images) -> Path:
    path = pack_shards(folder, images)
    (folder / "train-000001.tar").unlink()
    return path


def lose_a_part(folder: Path, images: Images) -> Path:
    path = pack_parquet(folder, images)
    (path / "train-00001-of-00002.parquet").unlink()
    return path


def skip_a_label(folder: Path, images: Images) -> Path:
    return write_tar(folder / "x.tar", [("a.jpg", b"x"), ("a.cls", b"7")])


def cut_parquet(folder: Path, images: Images) -> Path:
    path = write_parquet(folder / "x.parquet", [("a.jpg", b"x" * 5000, 0)])
    os.truncate(path, 2000)
    return path


def lose_a_label_in_parquet(folder: Path, images: Images) -> Path:
    return write_parquet(folder / "x.parquet", [("a.jpg", b"x", 0), ("b.jpg", b"x", None)])


def lose_an_image_in_parquet(folder: Path, images: Images) -> Path:
    return write_parquet(folder / "x.parquet", [("a.jpg", b"x", 0), ("b.jpg", None, 0)])


def name_other_columns(folder: Path, images: Images) -> Path:
    parquet.write_table(pyarrow.table({"img": [1], "label": [0]}), folder / "x.parquet")
    return folder / "x.parquet"


def mix_kinds(folder: Path, images: Images) -> Path:
    path = pack_parquet(folder, images)
    write_tar(path / "x.tar", [])
    return path


def hold_text(folder: Path, images: Images) -> Path:
    (folder / "x.tar").write_text("<html>404</html>" * 100)
    return folder / "x.tar"


@pytest.mark.parametrize(
    ("pack", "message"),
    [
        (cut_in_the_middle, r"x\.tar: .*(cut short|unexpected end of data)"),
        (cut_at_a_member, r"x\.tar: no end mark at byte [\d,]+: it was cut short"),
        (damage_a_header, r"x\.tar: no end mark at byte [\d,]+: it was cut short, or is damaged"),
        (cut_an_inner_tar, r"all\.tar: n01443537/.*(cut short)"),
        (compress, r"x\.tar: not a readable tar file .*gunzip"),
        (lead_outside, r"x\.tar: a/\.\./\.\./b\.jpg: this name leads out of the folder"),
        (link, r"x\.tar: a/b\.jpg: is a link"),
        (nest_deeply, r"x\.tar: a/b\.tar: a tar file in a tar file in a tar file"),
        (leave_out_classes, r"60 images have neither a class folder nor a label \(set train_lab"),
        (repeat_an_image, r"1 images are there again, by class and name: n0\d+/"),
        (hold_no_image, r"x\.tar: no images in it"),
        (lose_a_label, r"x\.tar: sample a has 1 images and 0 labels"),
        (lose_an_image, r"x\.tar: sample b has 0 images and 1 labels"),
        (hold_no_number, r"x\.tar: a\.cls is no whole number"),
        (
            unsort_a_shard,
            r"x\.tar: 2 files are not beside those of their sample; sort the shard: a",
        ),
        (lose_a_shard, r"1 shards train-\.\.\. are missing: 1"),
        (lose_a_part, r"1 files are missing: train-00001-of-00002\.parquet"),
        (skip_a_label, r"x\.tar: labels go up to 7, but no image has label 0, 1"),
        (cut_parquet, r"x\.parquet: not a readable parquet file .*cut short"),
        (lose_a_label_in_parquet, r"x\.parquet: row 1 \(b\.jpg\) has no label"),
        (lose_an_image_in_parquet, r"x\.parquet: row 1 has no image"),
        (name_other_columns, r"x\.parquet: its columns are img, label; expected columns `image`"),
        (mix_kinds, r"expected \.tar or \.parquet files, found \['\.parquet', '\.tar'\]"),
        (hold_text, r"x\.tar: not a readable tar file"),
    ],
)
def test_what_is_wrong_is_named(pack: Pack, message: str, images: Images, tmp_path: Path) -> None:
    path = pack(tmp_path, images)
    with pytest.raises(SourceError, match=message):
        open_packed(path, None, tmp_path / "memory")
    assert not (tmp_path / "memory").exists()


def settings(**more: Any) -> ConvertConfig:
    return ConvertConfig(dataset="mine", num_val_images=0, **more)


@pytest.mark.parametrize(
    ("more", "message"),
    [
        ({"num_classes": 0, "train_dir": "x.tar"}, "num_classes: 0 need a folder of images"),
        (
            {"train_dir": "x.tar", "train_list": "l.txt", "num_train_images": 1},
            "train_list and num_classes: 0 need a folder",
        ),
        ({"train_dir": ".", "train_labels": "l.txt"}, "train_labels is for tar files"),
        ({"train_dir": "none.tar"}, "none.tar: 1 are no files: none.tar"),
        ({"train_dir": "none-*.tar"}, "expected .tar or .parquet files, found none"),
    ],
)
def test_settings_that_contradict(
    more: dict[str, Any], message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "cat").mkdir()
    write_tar(tmp_path / "x.tar", [("cat/a.jpg", b"x")])
    with pytest.raises((SourceError, ValueError), match=message):
        open_splits(tmp_path, settings(**more))


def test_labels_beside_labels_are_refused(images: Images, tmp_path: Path) -> None:
    (tmp_path / "l.txt").write_text("a\n")
    with pytest.raises(SourceError, match="its images have labels, so there is nothing to take"):
        open_packed(pack_shards(tmp_path, images), tmp_path / "l.txt", None)


def test_numbers_name_the_classes_of_images_without_names(tmp_path: Path) -> None:
    def rows() -> Iterator[tuple[str | None, bytes, int]]:
        for index in range(22):
            yield None, b"image %d" % index, index % 11

    source = open_packed(write_parquet(tmp_path / "x.parquet", list(rows())), None, None)  # type: ignore[arg-type]
    assert source.classes == [f"{number:02d}" for number in range(11)]
    assert source.labels == [number // 2 for number in range(22)]
    assert source.paths[:2] == ["00/x_000000.jpg", "00/x_000011.jpg"]
    assert source.read(1) == source.locate(1).read() == b"image 11"


def test_parquet_files_need_pyarrow(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write_parquet(tmp_path / "x.parquet", [("a.jpg", b"x", 0)])
    monkeypatch.setitem(__import__("sys").modules, "pyarrow", None)
    with pytest.raises(SourceError, match=r"needs pyarrow \(pip install 'mugs-repro\[parquet\]'\)"):
        open_packed(path, None, None)


def test_a_folder_of_images_is_none_of_files(tmp_path: Path, images: Images) -> None:
    folder = pack_folder(tmp_path, images)
    write_tar(folder / "leftover.tar", [])
    assert not is_packed(folder)
    assert not is_packed(tmp_path / "missing")
