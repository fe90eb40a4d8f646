"""Data sets that are not class folders, and the layout check before anything is converted."""

import shutil
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from PIL import Image

from mugs.data.mini.photographs import COLUMNS, ROWS, SIDE, cut_patches
from mugs.data.sources.base import SourceError, describe_skipped
from mugs.data.sources.beton import BetonSource
from mugs.data.sources.convert import convert_to_beton, verify_beton
from mugs.data.sources.expected import ExpectedCounts, check_expected_counts
from mugs.data.sources.folder import FolderSource
from mugs.data.sources.listing import from_list, open_images
from mugs.data.sources.open import open_source
from pipeline import config
from pipeline.plan import build_plan, list_unset_settings
from stages import STAGES
from stages.convert import run
from stages.shared.frozen import read_num_classes
from stages.shared.image_data import ConvertConfig, find_image_folder, open_splits


def fill(root: Path, *names: str) -> Path:
    for shade, name in enumerate(names):
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (12, 10), (25 * shade, 0, 0)).save(root / name, "JPEG")
    return root


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return fill(
        tmp_path / "images", "cat/a.jpg", "cat/b.jpg", "dog/a b.jpg", "dog/c.jpg", "emu/d.jpg"
    )


def written(tmp_path: Path, text: str) -> Path:
    path = tmp_path / "list.txt"
    path.write_text(text)
    return path


def test_a_list_of_paths_takes_classes_from_folders(folder: Path, tmp_path: Path) -> None:
    # A stray blank line, spaces at an end, a missing final newline (row E7) and the mark of Windows
    # at the start lose no image.
    text = "\ufeffdog/a b.jpg\n\ncat/b.jpg  \n./cat/a.jpg"
    source = from_list(folder, written(tmp_path, text))
    assert source.paths == ["dog/a b.jpg", "cat/b.jpg", "cat/a.jpg"]
    assert (source.labels, source.classes) == ([1, 0, 0], ["cat", "dog"])


@pytest.mark.parametrize(
    ("text", "labels", "classes"),
    [
        ("cat/a.jpg x\ndog/a b.jpg\tw\nemu/d.jpg x\n", [1, 0, 1], ["w", "x"]),
        ("cat/a.jpg 10\ndog/a b.jpg 9\nemu/d.jpg 10\n", [1, 0, 1], ["9", "10"]),
    ],
)
def test_a_list_with_labels_converts_and_verifies(
    folder: Path, tmp_path: Path, text: str, labels: list[int], classes: list[str]
) -> None:
    source, target = open_images(folder, written(tmp_path, text)), tmp_path / "x.beton"
    convert_to_beton(source, target)
    pack = BetonSource(target)
    assert [pack.label(i) for i in range(3)] == labels and pack.classes == classes
    assert [pack.name(i) for i in range(3)] == source.paths and pack.read(1) == (
        folder / "dog/a b.jpg"
    ).read_bytes()
    assert verify_beton(target) == []


def test_other_labels_are_another_data_set(folder: Path, tmp_path: Path) -> None:
    first = from_list(folder, written(tmp_path, "cat/a.jpg x\ncat/b.jpg y\n")).fingerprint
    assert first != from_list(folder, written(tmp_path, "cat/a.jpg y\ncat/b.jpg x\n")).fingerprint


@pytest.mark.parametrize(
    ("text", "words"),
    [
        (
            "cat/a.jpg\ncat/none.jpg\ndog/none.jpg x\n",
            ["2 of its lines name no file below", "cat/none.jpg, dog/none"],
        ),
        ("cat/a.jpg\n../images/cat/b.jpg\n", ["1 of its lines name no file below"]),
        ("cat/a.jpg\ncat/b.jpg\ncat/a.jpg\n", ["1 of its lines name a file again: cat/a.jpg"]),
        ("cat/a.jpg x\ncat/b.jpg\n", ["1 of its lines carry no label, others do: cat/b.jpg"]),
        ("flat.jpg\n", ["neither a label nor a class folder", "num_classes: 0", "flat.jpg"]),
        ("\n \n", ["names no file"]),
    ],
)
def test_bad_lists_are_explained(folder: Path, tmp_path: Path, text: str, words: list[str]) -> None:
    fill(folder, "flat.jpg")
    with pytest.raises(SourceError) as caught:
        from_list(folder, written(tmp_path, text))
    assert str(caught.value).startswith(str(tmp_path / "list.txt")) and "\n" not in str(
        caught.value
    )
    assert all(word in str(caught.value) for word in words), caught.value


def test_a_list_that_is_not_there(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(SourceError, match=r"list\.txt: cannot be read"):
        from_list(folder, tmp_path / "list.txt")


def test_without_labels(tmp_path: Path) -> None:
    root = fill(tmp_path / "images", "b.jpg", "a.jpg", "more/c.jpg")
    source = open_images(root, labeled=False)
    assert (source.paths, source.labels, source.classes) == (
        ["a.jpg", "b.jpg", "more/c.jpg"],
        [-1] * 3,
        [],
    )
    convert_to_beton(source, tmp_path / "x.beton")
    assert [BetonSource(tmp_path / "x.beton").label(i) for i in range(3)] == [-1] * 3
    assert verify_beton(tmp_path / "x.beton") == []
    with pytest.raises(SourceError, match="no images in it"):
        open_images(fill(tmp_path / "empty/x", "x.txt").parent, labeled=False)


def test_a_flat_folder_says_what_to_do(tmp_path: Path) -> None:
    with pytest.raises(
        SourceError, match=r"no class folders.*2 images directly in it: .*num_classes: 0"
    ):
        FolderSource(fill(tmp_path / "flat", "a.jpg", "b.jpg"))
    (tmp_path / "tars").mkdir()
    (tmp_path / "tars/n01440764.tar").touch()
    with pytest.raises(SourceError, match=r"1 \.tar files: unpack each"):
        FolderSource(tmp_path / "tars")


def context(tmp_path: Path) -> Any:
    return SimpleNamespace(run_dir=tmp_path / "run", stage="convert", control=None)


def test_imagenet_is_checked_before_anything_is_converted(folder: Path, tmp_path: Path) -> None:
    val = fill(tmp_path / "val", "ILSVRC2012_val_00000001.JPEG", "ILSVRC2012_val_00000002.JPEG")
    cfg = ConvertConfig(dataset="imagenet1k", train_dir=str(folder), val_dir=str(val))
    with pytest.raises(SourceError) as caught:
        run(context(tmp_path), cfg)
    message = str(caught.value)
    assert (
        "\n" not in message and "imagenet1k is not as expected, nothing was converted: " in message
    )
    assert (
        f"train ({folder}): 3 classes found, 1000 expected, "
        f"5 images found, 1281167 expected; val: {val}" in message
    )
    assert "2 images directly in it" in message
    assert not list((tmp_path / "run").glob("*.beton"))


def test_what_was_known_can_be_declared_otherwise(folder: Path) -> None:
    known = ExpectedCounts(3, {"train": 5, "val": None}).or_known("imagenet1k")
    assert (known.classes, known.images) == (3, {"train": 5, "val": 50_000})
    assert ExpectedCounts(None, {"train": None}).or_known("mine") == ExpectedCounts(None, {})
    check_expected_counts("mine", {"train": FolderSource(folder)}, ExpectedCounts(3, {"train": 5}))


def test_splits_of_other_classes(folder: Path, tmp_path: Path) -> None:
    val = fill(tmp_path / "val", "cat/a.jpg", "yak/b.jpg")
    with pytest.raises(
        SourceError, match=r"2 classes of train are not in val: dog, emu; 1 classes of val .*: yak"
    ):
        check_expected_counts(
            "mine", {"train": FolderSource(folder), "val": FolderSource(val)}, ExpectedCounts()
        )


def test_letters_that_unicode_composes_in_two_ways(tmp_path: Path) -> None:
    """MacOS takes names apart, Linux does not: the classes look alike in every listing."""
    composed, apart = "caf\u00e9/a.jpg", "cafe\u0301/a.jpg"
    train = FolderSource(fill(tmp_path / "train", composed, "dog/b.jpg"))
    val = FolderSource(fill(tmp_path / "val", apart, "dog/b.jpg"))
    with pytest.raises(SourceError, match="differ only in how Unicode composes the letters"):
        check_expected_counts("mine", {"train": train, "val": val}, ExpectedCounts())
    both = FolderSource(fill(tmp_path / "both", composed, apart))
    with pytest.raises(SourceError, match="train: 1 classes have two folders"):
        check_expected_counts("mine", {"train": both}, ExpectedCounts())


def test_validation_on_the_training_images_is_said(folder: Path, tmp_path: Path) -> None:
    """By the plan, and by the conversion, which knows images by their content."""
    (tmp_path / "link").symlink_to(folder)
    cfg = ConvertConfig(dataset="mine", train_dir=str(folder), val_dir=str(tmp_path / "link"))
    (remark,) = cfg.list_remarks({})
    assert "the same folder" in remark
    shutil.copy(folder / "cat/a.jpg", folder / "dog/copy.jpg")
    out = run(context(tmp_path), cfg)
    assert out.info["notes"] == [
        "train: 1 images are in more than one class, by content",
        "val: 1 images are in more than one class, by content",
        "val: 6 of 6 images are training images as well",
    ]
    val = fill(tmp_path / "val", "cat/x.jpg", "dog/y.jpg", "emu/z.jpg")
    assert not replace(cfg, val_dir=str(val)).list_remarks({})
    lists = {"train_list": "a.txt", "val_list": "b.txt", "num_train_images": 1}
    assert not replace(cfg, **lists, num_val_images=1).list_remarks({})


def test_images_beside_the_class_folders_are_counted(folder: Path) -> None:
    fill(folder, "top.jpg", "other.jpg")
    source = FolderSource(folder)
    assert len(source) == 5
    assert describe_skipped(source.skipped) == (
        "2 images lie beside the class folders and are left out"
    )


def test_the_stage_with_lists(folder: Path, tmp_path: Path) -> None:
    values: dict[str, Any] = {"dataset": "mine", "train_dir": str(folder), "val_dir": str(folder)}
    train, val = tmp_path / "train.txt", tmp_path / "val.txt"
    train.write_text("cat/a.jpg\ndog/c.jpg\n")
    val.write_text("cat/b.jpg cat\nemu/d.jpg dog\n")
    with pytest.raises(ValueError, match="train_list needs num_train_images"):
        ConvertConfig(**values, train_list=str(train))
    values |= {"train_list": str(train), "val_list": str(val), "num_train_images": 2}
    out = run(context(tmp_path), ConvertConfig(**values, num_val_images=2))
    assert [BetonSource(out.outputs["val"]).label(i) for i in range(2)] == [0, 1]
    assert out.info == {"dataset": "mine", "num_classes": 2}
    with pytest.raises(SourceError, match="2 images found, 3 expected"):
        run(context(tmp_path), ConvertConfig(**values, num_val_images=3))


def test_the_stage_without_labels_and_validation(tmp_path: Path) -> None:
    root = fill(tmp_path / "images", "a.jpg", "b.jpg")
    cfg = ConvertConfig(dataset="web", num_classes=0, num_val_images=0, train_dir=str(root))
    out = run(context(tmp_path), cfg)
    assert set(out.outputs) == {"train", "train_sidecar"} and out.info["num_classes"] == 0
    ctx: Any = SimpleNamespace(stage="knn", inputs={"data": out})
    with pytest.raises(ValueError, match="data set 'web' has no labels, which stage 'knn' needs"):
        read_num_classes(ctx)


def test_allowed_bad_files_do_not_change_the_count(folder: Path, tmp_path: Path) -> None:
    (folder / "cat/bad.jpg").write_text("no image")
    values: dict[str, Any] = {
        "dataset": "mine",
        "train_dir": str(folder),
        "num_val_images": 0,
        "num_train_images": 6,
    }
    out = run(context(tmp_path), ConvertConfig(**values, allow_bad=("cat/bad.jpg",)))
    assert len(BetonSource(out.outputs["train"])) == 5


def test_allowed_bad_files_have_to_exist(folder: Path) -> None:
    names = ("cat/a.jpg", "cat/nowhere.jpg", "a.jpg")
    cfg = ConvertConfig(
        dataset="mine", train_dir=str(folder), val_dir=str(folder), allow_bad=names[:1]
    )
    assert len(open_splits(folder, cfg)["train"]) == 5
    with pytest.raises(SourceError, match=r"^allow_bad: 2 of its names .*: cat/nowhere.jpg, a.jpg"):
        open_splits(folder, replace(cfg, allow_bad=names))


def test_a_plan_does_not_ask_for_a_folder_that_is_not_needed() -> None:
    sets = ["imagenet.num_classes=0", "imagenet.num_val_images=0"]
    whole = config.load_reproduction("mugs_vit_s16_ep100", STAGES, sets)
    # Evaluations need labels and validation images; a pretraining needs neither.
    runs = build_plan(replace(whole, runs={n: whole.runs[n] for n in ("imagenet", "pretrain")}))
    assert [line.split()[0] for line in list_unset_settings(runs)] == ["imagenet.train_dir"]


BUILTIN = "builtin:sklearn_photo_patches"


def test_no_pixel_is_in_two_patches_and_each_is_of_its_region() -> None:
    height, width = 100, 190
    pixels = np.arange(height * width * 3).reshape(height, width, 3)
    patches = list(cut_patches("photo", pixels))
    assert {patch.shape for _, patch in patches} == {(SIDE, SIDE, 3)}
    first = np.concatenate([patch[..., 0].ravel() for _, patch in patches])
    assert len(np.unique(first)) == len(first) == ROWS * COLUMNS * 2 * 2 * SIDE * SIDE
    for name, patch in patches:
        rows, columns = (patch[..., 0] // 3) // width, (patch[..., 0] // 3) % width
        regions = {
            f"photo_row{r}_column{c}"
            for r, c in zip(rows.ravel() // 50, columns.ravel() // 63, strict=True)
        }
        assert regions == {name}


def test_the_stage_writes_and_converts_them(tmp_path: Path) -> None:
    cfg = ConvertConfig(
        dataset="sklearn_photo_patches",
        num_classes=ROWS * COLUMNS * 2,
        num_train_images=614,
        num_val_images=154,
        train_dir=BUILTIN,
        val_dir=BUILTIN,
    )
    out = run(SimpleNamespace(run_dir=tmp_path, control=None), cfg)  # type: ignore[arg-type]
    assert out.info == {"dataset": "sklearn_photo_patches", "num_classes": 12}
    for split, least in (("train", 51), ("val", 12)):
        source = open_source(out.outputs[split])
        counts = np.bincount([source.label(i) for i in range(len(source))])
        assert len(counts) == 12 and counts.min() == least and counts.max() == least + 1


def test_other_built_in_images_are_refused(tmp_path: Path) -> None:
    with pytest.raises(
        ValueError,
        match=r"train_dir: there is no builtin:sklearn_digit \(valid: builtin:sklearn_dig",
    ):
        find_image_folder("builtin:sklearn_digit", "train", tmp_path)
