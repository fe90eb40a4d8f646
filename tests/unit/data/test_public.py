"""Public data sets in small made-up copies of their layouts: read right,
and every mistake in one line.
"""

import io
import json
import os
import pickle
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from PIL import Image
from scipy.io import savemat

from mugs.data.sources.base import SourceError
from mugs.data.sources.beton import BetonSource
from mugs.data.sources.cifar import SIDE
from mugs.data.sources.convert import verify_beton
from mugs.data.sources.decode import decode_rgb
from mugs.data.sources.expected import KNOWN
from mugs.data.sources.public import PUBLIC, open_public
from stages import convert as stage
from stages.shared import image_data
from stages.shared.image_data import ConvertConfig, open_splits


def pixels(num: int, seed: int) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (num, 3 * SIDE * SIDE), dtype=np.uint8)


def python2(name: str, rows: np.ndarray, labels: list[int]) -> bytes:
    """A pickle as Python 2 wrote those that are published:
    text and array bytes as 8-bit strings.
    """

    def text(value: str) -> bytes:
        return b"U" + bytes([len(value)]) + value.encode()

    data = rows.tobytes()
    array = (
        b"cnumpy.core.multiarray\n_reconstruct\ncnumpy\nndarray\nK\x00\x85U\x01b\x87R(K\x01"
        + b"".join(b"M" + size.to_bytes(2, "little") for size in rows.shape)
        + b"\x86cnumpy\ndtype\nU\x02u1K\x00K\x01\x87R(K\x03U\x01|NNN"
        + b"J\xff\xff\xff\xffJ\xff\xff\xff\xffK\x00tb\x89T"
        + len(data).to_bytes(4, "little")
        + data
        + b"tb"
    )
    numbers = b"](" + b"".join(b"K" + bytes([label]) for label in labels) + b"e"
    return b"\x80\x02}(" + text("data") + array + text(name) + numbers + b"u."


def cifar10(root: Path) -> Path:
    folder = root / "cifar-10-batches-py"
    folder.mkdir(parents=True)
    for index, name in enumerate([*(f"data_batch_{i}" for i in range(1, 6)), "test_batch"]):
        (folder / name).write_bytes(
            python2("labels", pixels(2, index), [2 * index % 10, (2 * index + 1) % 10])
        )
    (folder / "batches.meta").write_bytes(
        pickle.dumps({"label_names": [f"c{i}" for i in range(10)]}, protocol=2)
    )
    return root


def cifar100(root: Path) -> Path:
    folder = root / "cifar-100-python"
    folder.mkdir(parents=True)
    for index, name in enumerate(("train", "test")):
        content = {"data": pixels(3, index), "fine_labels": [0, 99, 7], "coarse_labels": [0, 1, 2]}
        (folder / name).write_bytes(pickle.dumps(content, protocol=2))
    (folder / "meta").write_bytes(
        pickle.dumps({"fine_label_names": [f"f{i}" for i in range(100)]}, protocol=2)
    )
    return root


def picture(path: Path, shade: int = 0) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (20, 16), (shade, 0, 0)).save(path, "JPEG")


def inat(root: Path, year: int) -> Path:
    for split, names in (
        ("train", ["Plantae/5/a", "Plantae/9/b", "Aves/7/c"]),
        ("val", ["Plantae/5/d"]),
    ):
        files = [f"train_val{year}/{name}.jpg" for name in names]
        for file in files:
            picture(root / file)
        content: dict[str, Any] = {
            "images": [{"id": i, "file_name": file} for i, file in enumerate(files)],
            "annotations": [
                {"image_id": i, "category_id": int(f.split("/")[2])} for i, f in enumerate(files)
            ],
        }
        kinds = [{"id": i, "name": f"species {i}"} for i in (9, 5, 7)]
        # only its own species in it
        for kind, name in ((7, "e"), (9, "f")) if split == "val" else ():
            file = f"train_val{year}/x/{kind}/{name}.jpg"
            picture(root / file)
            content["images"].append({"id": 10 + kind, "file_name": file})
            content["annotations"].insert(0, {"image_id": 10 + kind, "category_id": kind})
        if year != 2018:
            content["categories"] = kinds
        else:
            (root / "categories.json").write_text(json.dumps(kinds))
        (root / f"{split}{year}.json").write_text(json.dumps(content))
    return root


def flowers(root: Path) -> Path:
    labels = np.concatenate([np.arange(1, 103), np.arange(1, 103), np.arange(102, 0, -1)])
    for number in range(1, len(labels) + 1):
        picture(root / f"jpg/image_{number:05d}.jpg")
    savemat(root / "imagelabels.mat", {"labels": labels[None]})
    order = np.arange(1, len(labels) + 1)[None]
    savemat(
        root / "setid.mat",
        {"trnid": order[:, :60], "valid": order[:, 60:102], "tstid": order[:, 204:]},
    )
    return root


def annotations(path: Path, entries: list[tuple[str, int]]) -> None:
    kinds = [("bbox_x1", "O"), ("class", "O"), ("fname", "O")]
    table = np.array([(7, number, name) for name, number in entries], dtype=kinds)
    path.parent.mkdir(parents=True, exist_ok=True)
    savemat(path, {"annotations": table[None]})


def cars(root: Path, *, beside: bool = False) -> Path:
    of_split = {
        "train": [("00001.jpg", 2), ("00002.jpg", 1)],
        "test": [("00001.jpg", 1), ("00002.jpg", 2)],
    }
    for split, entries in of_split.items():
        for name, _ in entries:
            picture(root / f"cars_{split}" / name)
        folder = root if beside and split == "test" else root / "devkit"
        annotations(
            folder / f"cars_{split}_annos{'' if split == 'train' else '_withlabels'}.mat", entries
        )
    savemat(
        root / "devkit/cars_meta.mat",
        {"class_names": np.array([["AM General", "Audi"]], dtype=object)},
    )
    return root


def test_cifar10(tmp_path: Path) -> None:
    root = cifar10(tmp_path)
    for folder in (root, root / "cifar-10-batches-py"):
        train, val = (open_public("cifar10", folder, split) for split in ("train", "val"))
        assert (train.labels, val.labels) == ([0, 1, 2, 3, 4, 5, 6, 7, 8, 9], [0, 1])
        assert train.classes == [f"c{i}" for i in range(10)] and train.name(3) == "train/00003.jpg"
        expected = pixels(2, 1)[1].reshape(3, SIDE, SIDE).transpose(1, 2, 0)
        made = np.asarray(Image.open(io.BytesIO(train.read(3)))).astype(int)
        assert abs(made - expected).mean() < 1.5
    assert train.fingerprint != val.fingerprint


def test_cifar100_has_fine_labels(tmp_path: Path) -> None:
    source = open_public("cifar100", cifar100(tmp_path), "val")
    assert (source.labels, len(source.classes), source.classes[7]) == ([0, 99, 7], 100, "f7")


@pytest.mark.parametrize("year", [2018, 2019])
def test_inat(tmp_path: Path, year: int) -> None:
    train, val = (
        open_public(f"inat{year - 2000}", inat(tmp_path, year), split) for split in ("train", "val")
    )
    assert train.classes == val.classes == ["5 species 5", "7 species 7", "9 species 9"]
    assert (train.labels, val.labels) == ([0, 2, 1], [0, 1, 2])
    assert train.paths[1] == f"train_val{year}/Plantae/9/b.jpg" and train.read(0)


def write_again(path: Path, what: str, **changes: object) -> None:
    """List the first entry of a list a second time."""
    content = json.loads(path.read_text())
    content[what].append({**content[what][0], **changes})
    path.write_text(json.dumps(content))


@pytest.mark.parametrize(
    ("what", "changes", "words"),
    [
        ("images", {}, "1 images are listed again, by id: 0"),
        ("annotations", {}, "1 images of annotations are listed again, by id: 0"),
        ("annotations", {"category_id": 9}, "1 images of annotations are listed again, by id: 0"),
        ("annotations", {"image_id": 99}, "1 annotations are of images that are not listed: 99"),
        ("images", {"id": 99}, "1 images have no category"),
    ],
)
def test_inat_listed_twice(
    tmp_path: Path, what: str, changes: dict[str, object], words: str
) -> None:
    root = inat(tmp_path, 2019)
    write_again(root / "train2019.json", what, **changes)
    with pytest.raises(SourceError, match=words):
        open_public("inat19", root, "train")


def test_an_image_of_cars_that_is_named_again(tmp_path: Path) -> None:
    root = cars(tmp_path)
    annotations(root / "devkit/cars_train_annos.mat", [("00001.jpg", 2), ("00001.jpg", 1)])
    with pytest.raises(SourceError, match=r"1 images are named again: cars_train/00001.jpg"):
        open_public("cars", root, "train")


def test_flowers_trains_on_train_and_validation(tmp_path: Path) -> None:
    train, val = (open_public("flowers102", flowers(tmp_path), split) for split in ("train", "val"))
    assert (len(train), len(val), train.labels[0], train.labels[101]) == (102, 102, 0, 101)
    assert (val.paths[0], val.labels[0]) == ("jpg/image_00205.jpg", 101)


@pytest.mark.parametrize("beside", [False, True])
def test_cars_count_from_zero(tmp_path: Path, beside: bool) -> None:
    train, val = (
        open_public("cars", cars(tmp_path, beside=beside), split) for split in ("train", "val")
    )
    assert (train.labels, val.labels, train.classes) == ([1, 0], [0, 1], ["AM General", "Audi"])
    assert train.paths == ["cars_train/00001.jpg", "cars_train/00002.jpg"]


class Evil:
    """What a published file never holds."""

    def __reduce__(self) -> Any:
        return print, ("ran",)


def set_first_category(path: Path, category: int) -> None:
    content = json.loads(path.read_text())
    content["annotations"][0]["category_id"] = category
    path.write_text(json.dumps(content))


def name_first_image(path: Path, name: str) -> None:
    """Name another file, which exists."""
    (path.parents[1] / "outside.jpg").write_bytes(b"x")
    content = json.loads(path.read_text())
    content["images"][0]["file_name"] = name
    path.write_text(json.dumps(content))


CIFAR_BATCH = "cifar-10-batches-py/test_batch"


def array_pickle(kind: bytes, data: bytes, shape: bytes = b"K\x02M\x00\x0c\x86") -> bytes:
    """A batch whose array has another type, shape or number of bytes than NumPy would write."""
    return (
        b"\x80\x02}(U\x04datacnumpy.core.multiarray\n_reconstruct\ncnumpy\nndarray\nK\x00\x85U\x01b"
        b"\x87R(K\x01"
        + shape
        + b"cnumpy\ndtype\nU"
        + bytes([len(kind)])
        + kind
        + b"K\x00K\x01\x87R(K\x03U\x01|NNNJ\xff\xff\xff\xffJ\xff\xff\xff\xffK?tb\x89T"
        + len(data).to_bytes(4, "little")
        + data
        + b"tbU\x06labels](K\x00K\x01eu."
    )


def write_batch(content: bytes) -> Callable[[Path], object]:
    """Return what puts this in the place of the test batch."""
    return lambda root: (root / CIFAR_BATCH).write_bytes(content)


CARS_VAL = "devkit/cars_test_annos_withlabels.mat"
# What the mistake is, the data set in which it is made, how, and the words that the message has.
MISTAKES: dict[str, tuple[str, Callable[[Path], Any], str]] = {
    "evil": (
        "cifar10",
        lambda root: (root / CIFAR_BATCH).write_bytes(pickle.dumps({"data": Evil()})),
        r"test_batch: not a CIFAR file \(asks for builtins\.print",
    ),
    "cut": (
        "cifar10",
        lambda root: os.truncate(root / CIFAR_BATCH, (root / CIFAR_BATCH).stat().st_size - 90),
        r"test_batch: not a CIFAR file \(",
    ),
    "no batch": (
        "cifar10",
        lambda root: (root / CIFAR_BATCH).unlink(),
        r"test_batch: no such file",
    ),
    "high label": (
        "cifar10",
        lambda root: (root / CIFAR_BATCH).write_bytes(python2("labels", pixels(2, 0), [3, 10])),
        r"test_batch: labels 10, expected 0 to 9",
    ),
    **{
        f"array of {kind.decode()}": (
            "cifar10",
            write_batch(array_pickle(kind, bytes(6144))),
            rf"test_batch: not a CIFAR file \(holds an array of '{kind.decode()}'",
        )
        for kind in (b"O", b"O8", b"V8", b"f8", b"M8", b"S3072", b"i1")
    },
    "too few bytes": (
        "cifar10",
        write_batch(array_pickle(b"u1", bytes(100))),
        r"holds an array with a wrong type or number of bytes",
    ),
    "a wrong shape": (
        "cifar10",
        write_batch(array_pickle(b"u1", bytes(6144), b"](K\x02K\x03e")),
        r"holds an array with a wrong type or number of bytes",
    ),
    "no array": (
        "cifar10",
        write_batch(pickle.dumps({"data": [1], "labels": [0]})),
        r"test_batch: expected 1 rows of 3072 bytes under 'data'",
    ),
    "labels of another kind": (
        "cifar10",
        write_batch(pickle.dumps({"data": pixels(1, 0), "labels": [1.5]})),
        r"test_batch: expected a list of whole numbers under 'labels'",
    ),
    "a memo that fills the memory": (
        "cifar10",
        write_batch(b"\x80\x02]r\xff\xff\xff\x7f."),
        r"test_batch: not a CIFAR file \(numbers an object 2147483647\)",
    ),
    "a pipe": (
        "cifar10",
        lambda root: ((root / CIFAR_BATCH).unlink(), os.mkfifo(root / CIFAR_BATCH)),
        r"test_batch: not a CIFAR file \(.*not a regular file",
    ),
    "an image elsewhere": (
        "inat18",
        lambda root: name_first_image(root / "val2018.json", "../outside.jpg"),
        r"named images are not below",
    ),
    "an absolute image": (
        "inat18",
        lambda root: name_first_image(root / "val2018.json", str(root.parent / "outside.jpg")),
        r"named images are not below",
    ),
    "rows": (
        "cifar10",
        lambda root: (root / CIFAR_BATCH).write_bytes(python2("labels", pixels(2, 0), [3])),
        r"test_batch: expected 1 rows of 3072 bytes under 'data'",
    ),
    "keys": (
        "cifar10",
        lambda root: (root / CIFAR_BATCH).write_bytes(pickle.dumps({"x": 1})),
        r"test_batch: not a CIFAR file \(no 'data', 'labels' in it\)",
    ),
    "no json": (
        "inat18",
        lambda root: (root / "val2018.json").unlink(),
        r"val2018\.json: no such file",
    ),
    "bad json": (
        "inat18",
        lambda root: (root / "val2018.json").write_text("{"),
        r"val2018\.json: not readable as JSON",
    ),
    "other json": (
        "inat18",
        lambda root: (root / "val2018.json").write_text('{"images": [{}]}'),
        r"val2018\.json: not an iNaturalist file",
    ),
    "unknown species": (
        "inat18",
        lambda root: set_first_category(root / "val2018.json", 77),
        r"1 images have no category, or one that is not listed: train_val2018/x/9/f",
    ),
    "missing species": (
        "inat18",
        lambda root: set_first_category(root / "val2018.json", 5),
        r"1 classes have no image: 9 species 9",
    ),
    "missing image": (
        "inat18",
        lambda root: (root / "train_val2018/Plantae/5/d.jpg").unlink(),
        r"1 named images are not below .*: train_val2018/Plantae/5/d\.jpg",
    ),
    "no mat": (
        "flowers102",
        lambda root: (root / "setid.mat").unlink(),
        r"setid\.mat: no such file",
    ),
    "bad mat": (
        "flowers102",
        lambda root: (root / "setid.mat").write_bytes(b"no matlab" * 40),
        r"setid\.mat: not readable as a MATLAB file",
    ),
    "variable": (
        "flowers102",
        lambda root: savemat(root / "setid.mat", {"x": 1}),
        r"setid\.mat: no variable 'tstid' in it",
    ),
    "number": (
        "flowers102",
        lambda root: savemat(
            root / "setid.mat", {"trnid": [[1]], "valid": [[2]], "tstid": [[999]]}
        ),
        r"1 numbers are not those of the 306 labeled images: 999",
    ),
    "missing picture": (
        "flowers102",
        lambda root: (root / "jpg/image_00205.jpg").unlink(),
        r"1 named images are not below .*: jpg/image_00205\.jpg",
    ),
    "no labels": (
        "cars",
        lambda root: (root / CARS_VAL).unlink(),
        r"cars_test_annos_withlabels\.mat is neither in devkit nor beside it",
    ),
    "fields": (
        "cars",
        lambda root: savemat(root / CARS_VAL, {"annotations": np.zeros(2)}),
        r"its annotations have no field 'class' or 'fname'",
    ),
    "label 197": (
        "cars",
        lambda root: annotations(root / CARS_VAL, [("00001.jpg", 1), ("00002.jpg", 3)]),
        r"1 labels are not 1 to 2: cars_test/00002\.jpg \(3\)",
    ),
}
MAKERS: dict[str, Callable[[Path], Path]] = {
    "cifar10": cifar10,
    "inat18": lambda root: inat(root, 2018),
    "flowers102": flowers,
    "cars": cars,
}


@pytest.mark.parametrize("kind", MISTAKES)
def test_mistakes_are_told_in_one_line(
    tmp_path: Path, kind: str, capsys: pytest.CaptureFixture[str]
) -> None:
    dataset, spoil, words = MISTAKES[kind]
    root = MAKERS[dataset](tmp_path)
    spoil(root)
    with pytest.raises(SourceError, match=words) as caught:
        open_public(dataset, root, "val")
    assert "\n" not in str(caught.value) and capsys.readouterr().out == ""


def test_what_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(SourceError, match="none: not a folder"):
        open_public("cifar10", tmp_path / "none", "train")
    for dataset in PUBLIC:
        with pytest.raises(SourceError, match=str(tmp_path)):
            open_public(dataset, tmp_path, "train")


def test_through_the_stage(tmp_path: Path) -> None:
    values: dict[str, Any] = {"dataset": "cifar10", "root": str(cifar10(tmp_path / "cifar"))}
    ctx: Any = SimpleNamespace(run_dir=tmp_path / "run", stage="convert", control=None)
    with pytest.raises(SourceError) as caught:
        stage.run(ctx, ConvertConfig(**values))
    message = str(caught.value)
    assert (
        "10 images found, 50000 expected" in message and "2 images found, 10000 expected" in message
    )
    assert "\n" not in message and not list((tmp_path / "run").glob("*.beton"))
    out = stage.run(ctx, ConvertConfig(**values, num_train_images=10, num_val_images=2))
    assert out.info == {"dataset": "cifar10", "num_classes": 10}
    packed = BetonSource(out.outputs["train"])
    assert [packed.label(i) for i in range(10)] == list(range(10)) and packed.classes[9] == "c9"


@pytest.mark.parametrize(("storage", "most"), [("jpeg", 4), ("original", 0)])
def test_pixels_of_cifar(tmp_path: Path, storage: Any, most: int) -> None:
    root = cifar10(tmp_path / "cifar")
    cfg = ConvertConfig(
        dataset="cifar10",
        root=str(root),
        num_train_images=10,
        num_val_images=2,
        storage=storage,
    )
    ctx: Any = SimpleNamespace(run_dir=tmp_path / "run", stage="convert", control=None)
    packed = BetonSource(stage.run(ctx, cfg).outputs["train"])
    pixels = PUBLIC["cifar10"](root, "train").pixels
    differences = [
        np.abs(np.asarray(decode_rgb(packed.read(i), "x")).astype(int) - pixels[i]).max()
        for i in range(10)
    ]
    assert max(differences) <= most and (max(differences) > 0) == (most > 0)
    assert packed.name(3) == f"train/00003.{'jpg' if most else 'png'}"
    assert not verify_beton(packed.path)


def test_a_truncated_image_is_named_before_anything_is_written(tmp_path: Path) -> None:
    root = inat(tmp_path / "inat", 2018)
    path = root / "train_val2018/Plantae/9/b.jpg"
    path.write_bytes(path.read_bytes()[:200])
    cfg = ConvertConfig(
        dataset="inat18", root=str(root), num_classes=3, num_train_images=3, num_val_images=3
    )
    ctx: Any = SimpleNamespace(run_dir=tmp_path / "run", stage="convert", control=None)
    words = r"1 of 3 files are not usable images: train_val2018/Plantae/9/b\.jpg"
    with pytest.raises(SourceError, match=words):
        stage.run(ctx, cfg)
    with pytest.raises(SourceError, match=words) as caught:
        stage.check_images(cfg, {})
    assert "\n" not in str(caught.value)
    assert not list((tmp_path / "run").glob("*.beton"))


def test_root_or_folders() -> None:
    public = ConvertConfig(dataset="cars")
    assert (public.root, public.train_dir, public.val_dir) == (None, "", "")
    folders = ConvertConfig(dataset="cars", train_dir="a", val_dir="b")
    assert (folders.root, folders.train_dir) == ("", "a")
    assert ConvertConfig(dataset="mine").root == ""
    with pytest.raises(ValueError, match="root is for cifar10"):
        ConvertConfig(dataset="mine", root="a")
    assert set(image_data.PUBLIC) == set(PUBLIC) == set(KNOWN) - {"imagenet1k", "coco2017"}


def test_without_a_folder_nothing_is_listed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # The working folder, as "" names it, may hold anything.
    (tmp_path / "cat").mkdir()
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError, match=r"^root is not set$"):
        open_splits(tmp_path, ConvertConfig(dataset="cars"))


def test_splits_of_a_public_data_set(tmp_path: Path) -> None:
    cfg = ConvertConfig(
        dataset="cars",
        root=str(cars(tmp_path)),
        num_classes=2,
        num_train_images=2,
        num_val_images=2,
    )
    assert {split: source.labels for split, source in open_splits(tmp_path, cfg).items()} == {
        "train": [1, 0],
        "val": [0, 1],
    }
