"""Scenes on disk, training crops and test inputs; the mini data set."""

import shutil
from collections.abc import Callable
from pathlib import Path
from unittest.mock import Mock, call

import numpy as np
import pytest
import torch
from numpy.random import Generator, Philox
from PIL import Image

from mugs.data.dense.ade20k import SceneFolder, check_scenes
from mugs.data.dense.pixels import fit_size
from mugs.data.mini.scenes_and_videos import bounce_position, materialize_scenes
from mugs.data.sources.base import SourceError
from mugs.data.sources.decode import DecodeError
from mugs.transfer.segmentation.config import SceneRecipe
from mugs.transfer.segmentation.views import (
    distort_colors,
    draw_crop,
    has_mixed_classes,
    render_test_view,
    render_training_crop,
    scale_saturation,
)
from stages.ade20k_data import Ade20kDataConfig


@pytest.fixture(scope="module")
def mini(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("scenes") / "mini"
    materialize_scenes(root, train=6, val=2)
    return root


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Two images of 6 x 4 pixels with labels 0 to 3."""
    for kind, suffix in (("images", "jpg"), ("annotations", "png")):
        (tmp_path / kind / "validation").mkdir(parents=True)
        for name in "ab":
            values = np.arange(24, dtype=np.uint8).reshape(4, 6) % 4
            Image.fromarray(values).save(tmp_path / kind / "validation" / f"{name}.{suffix}")
    return tmp_path


@pytest.fixture
def voc(folder: Path) -> Path:
    """The same in the layout of PASCAL VOC, with an image that is in no list and has no map."""
    root = folder / "VOC2012"
    root.mkdir()
    (folder / "images" / "validation").rename(root / "JPEGImages")
    (folder / "annotations" / "validation").rename(root / "SegmentationClass")
    shutil.copy(root / "JPEGImages" / "a.jpg", root / "JPEGImages" / "other task.jpg")
    lists = root / "ImageSets" / "Segmentation"
    lists.mkdir(parents=True)
    (lists / "train.txt").write_text("b\n")
    (lists / "val.txt").write_text("b\na\n")
    return root


def test_layout_of_pascal_voc(voc: Path) -> None:
    train, val = (
        SceneFolder(voc, split, num_classes=4, reduce_zero=False, layout="voc")
        for split in ("train", "val")
    )
    assert (train.names, val.names) == (["b"], ["a", "b"])
    # 0 is the background, and not void.
    assert val.read(1)[1][0].tolist() == [0, 1, 2, 3, 0, 1]
    options = {"num_classes": 4, "reduce_zero": False, "threads": 1, "report": Mock()}
    check_scenes(voc, {"train": 1, "val": 2}, layout="voc", **options)
    with pytest.raises(SourceError, match=r"JPEGImages: 1 images found, 1464 expected"):
        check_scenes(voc, {"train": 1464, "val": 2}, layout="voc", **options)


@pytest.mark.parametrize(
    ("names", "words"),
    [
        ("a\nc\n", r"VOC2012, val: 1 images that are listed and not there: c; 1 images without"),
        ("other\n", "1 images that are listed and not there: other"),
        ("a\nb\na\n", r"val\.txt: listed twice: a$"),
        ("", r"val\.txt: it names no image"),
        (None, r"val\.txt: not a readable list of images"),
    ],
)
def test_wrong_lists_of_pascal_voc_are_named(voc: Path, names: str | None, words: str) -> None:
    path = voc / "ImageSets" / "Segmentation" / "val.txt"
    path.unlink()
    if names is not None:
        path.write_text(names)
    with pytest.raises(SourceError, match=words):
        SceneFolder(voc, "val", num_classes=4, reduce_zero=False, layout="voc")


def test_the_background_of_pascal_voc_is_a_class() -> None:
    with pytest.raises(ValueError, match=r"reduce_zero: in the maps of PASCAL VOC 0 is a class"):
        Ade20kDataConfig(dataset="voc2012", layout="voc")


def test_zero_becomes_void_and_the_others_shift(folder: Path) -> None:
    image, labels = SceneFolder(folder, "val", num_classes=3).read(1)
    assert (image.shape, image.dtype, labels.dtype) == ((3, 4, 6), torch.uint8, torch.uint8)
    assert labels[0].tolist() == [255, 0, 1, 2, 255, 0]
    assert SceneFolder(folder, "val", num_classes=4, reduce_zero=False).read(1)[1][0].tolist() == [
        0,
        1,
        2,
        3,
        0,
        1,
    ]


def test_files_of_macos_are_no_scenes(folder: Path) -> None:
    for name in ("images/validation/._a.jpg", "annotations/validation/._a.png"):
        (folder / name).write_bytes(b"\x00\x05\x16\x07")
    assert SceneFolder(folder, "val", num_classes=3).names == ["a", "b"]


def write_map(path: Path, *rows: object) -> None:
    Image.fromarray(np.array(rows, dtype=np.uint8)).save(path)


def test_void_of_the_file_stays_void(folder: Path) -> None:
    write_map(folder / "annotations/validation/a.png", *[[255, 0, 1, 3, 2, 255]] * 4)
    labels = SceneFolder(folder, "val", num_classes=3).read(0)[1]
    assert labels[0].tolist() == [255, 255, 0, 2, 1, 255]


# What is done to the folder, and what is said when image 1 is read.
DAMAGE: dict[str, tuple[Callable[[Path], object], str]] = {
    "label": (lambda root: write_map(root / MAP, *[[4] * 6] * 4), r"b\.png: label 3 among 3"),
    "size": (
        lambda root: write_map(root / MAP, *[[1] * 6] * 5),
        r"b\.png: 6 x 5 pixels, its image has 6 x 4",
    ),
    "mode": (
        lambda root: write_map(root / MAP, *[[[1] * 3] * 6] * 4),
        r"b\.png: a map of mode RGB",
    ),
    "map": (lambda root: (root / MAP).write_bytes(b"no"), r"b\.png: not a readable PNG"),
    "image": (lambda root: (root / "images/validation/b.jpg").write_bytes(b"no"), r"b\.jpg"),
    "folder": (
        lambda root: (root / "images/validation").rename(root / "images/training"),
        r"images/validation: not a folder",
    ),
    "pair": (
        lambda root: (root / MAP).rename(root / "annotations/validation/c.png"),
        r"1 images without annotation: b; 1 annotations without image: c",
    ),
}
MAP = "annotations/validation/b.png"


@pytest.mark.parametrize("damage", DAMAGE)
def test_bad_files_and_folders_are_named(folder: Path, damage: str) -> None:
    make, words = DAMAGE[damage]
    make(folder)
    with pytest.raises((SourceError, DecodeError), match=words):
        SceneFolder(folder, "val", num_classes=3).read(1)


def test_counts_and_files_are_checked(mini: Path) -> None:
    seen: list[tuple[int, int]] = []
    options = {
        "num_classes": 11,
        "reduce_zero": True,
        "threads": 2,
        "report": lambda *told: seen.append(told),
    }
    check_scenes(mini, {"train": 6, "val": 2}, **options)
    assert seen == [(done, 8) for done in range(1, 9)]
    with pytest.raises(
        SourceError,
        match=r"2 problems: .*: 6 images found, 20210 expected, .*: 2 images found, 2000",
    ):
        check_scenes(mini, {"train": 20210, "val": 2000}, **options)
    with pytest.raises(
        SourceError, match=r"\d problems: .*training_000\d\.png: label \d+ among 2 classes"
    ):
        check_scenes(mini, {"train": 6, "val": 2}, **options | {"num_classes": 2})


@pytest.mark.parametrize(
    ("size", "limits", "expected"),
    [
        ((480, 640), (512, 2048), (512, 683)),
        ((640, 480), (512, 2048), (683, 512)),
        ((100, 4000), (512, 2048), (51, 2048)),
        ((1, 9000), (512, 2048), (1, 2048)),
        ((480, 640), (800, 1333), (800, 1067)),  # 1066.67
        ((100, 1000), (800, 1333), (133, 1333)),
        ((1000, 100), (800, 1333), (1333, 133)),
        ((1, 5000), (800, 1333), (1, 1333)),
    ],
)
def test_sizes_of_scenes_and_of_detection(
    size: tuple[int, int], limits: tuple[int, int], expected: tuple[int, int]
) -> None:
    """A panorama is held by the longer side, a portrait likewise."""
    assert fit_size(size, *limits) == expected


RECIPE = SceneRecipe(long_side=128, short_side=32, crop=32, window=32, stride=21)


@pytest.mark.parametrize("size", [(40, 60), (60, 40), (5, 7), (8, 400), (400, 8)])
def test_crops_of_any_image(size: tuple[int, int]) -> None:
    """Portrait, smaller than the crop, very long: what is missing is zero in the image and void in
    the labels.
    """
    image = torch.full((3, *size), 200, dtype=torch.uint8)
    labels = torch.zeros(size, dtype=torch.uint8)
    smaller = 0
    for sample in range(30):
        pixels, target = render_training_crop(
            image, labels, seed=0, epoch=0, sample=sample, recipe=RECIPE
        )
        assert pixels.shape == (3, 32, 32) and pixels.dtype == torch.float32
        assert target.shape == (32, 32) and target.dtype == torch.int64
        missing = target == 255
        assert torch.equal(missing, (pixels == 0).all(dim=0))
        smaller += bool(missing.any())
    assert smaller > 0  # ratio 0.5 at least


def test_image_and_labels_move_together() -> None:
    """Labels that repeat the picture still do so after every step, at places where nothing is
    interpolated.
    """
    labels = torch.zeros(64, 96, dtype=torch.uint8)
    labels[16:48, 24:72] = 1
    image = (labels * 200)[None].repeat(3, 1, 1)
    recipe = SceneRecipe(long_side=192, short_side=64, crop=48, photometric_prob=0.0)
    for sample in range(20):
        pixels, target = render_training_crop(
            image, labels, seed=1, epoch=2, sample=sample, recipe=recipe
        )
        bright = pixels[0] > 0.5
        known = target != 255
        assert (bright == (target == 1))[known].float().mean() > 0.9


def test_views_are_a_function_of_seed_epoch_and_image(mini: Path) -> None:
    image, labels = SceneFolder(mini, "train", num_classes=11).read(0)
    views = {
        key: render_training_crop(
            image, labels, seed=key[0], epoch=key[1], sample=key[2], recipe=RECIPE
        )
        for key in ((0, 0, 0), (1, 0, 0), (0, 1, 0), (0, 0, 1))
    }
    again = render_training_crop(image, labels, seed=0, epoch=0, sample=0, recipe=RECIPE)
    assert all(torch.equal(a, b) for a, b in zip(views[0, 0, 0], again, strict=True))
    assert len({view[0].sum().item() for view in views.values()}) == 4


def test_ratio_scales_the_limits_not_the_image() -> None:
    """A quarter-size image is scaled up to the limits: sides between 16 and 64 for a short side of
    32.
    """
    recipe = SceneRecipe(long_side=128, short_side=32, crop=200, max_class_share=1.0)
    sides = set()
    for sample in range(60):
        _, target = render_training_crop(
            torch.zeros(3, 8, 8, dtype=torch.uint8),
            torch.zeros(8, 8, dtype=torch.uint8),
            seed=0,
            epoch=0,
            sample=sample,
            recipe=recipe,
        )
        sides.add(int((target != 255).any(dim=0).sum()))
    assert min(sides) >= 16 and max(sides) <= 64 and len(sides) > 20


def test_mixed_crops() -> None:
    labels = torch.zeros(10, 10, dtype=torch.uint8)
    assert not has_mixed_classes(labels, 0.75)  # a single class
    labels[:, :2] = 3
    assert not has_mixed_classes(labels, 0.75)  # 80%
    labels[:, 5:] = 255
    assert has_mixed_classes(labels, 0.75)  # 60% of what is not void
    assert not has_mixed_classes(torch.full((4, 4), 255, dtype=torch.uint8), 0.75)


def test_exactly_the_share_is_too_much() -> None:
    labels = torch.zeros(4, 4, dtype=torch.uint8)
    labels[0] = 3
    assert not has_mixed_classes(labels, 0.75)
    assert has_mixed_classes(labels, 0.76)


@pytest.mark.parametrize(("share", "draws"), [(0.75, 11), (1.0, 1)])
def test_a_crop_is_drawn_eleven_times_at_most_and_once_at_any_share(
    share: float, draws: int
) -> None:
    labels = torch.zeros(50, 90, dtype=torch.uint8)
    recipe = SceneRecipe(long_side=128, short_side=32, crop=32, max_class_share=share)
    rng = Mock(wraps=Generator(Philox(3)))
    again = Generator(Philox(3))
    expected = [(int(again.integers(19)), int(again.integers(59))) for _ in range(draws)]
    assert draw_crop(labels, rng, recipe) == expected[-1]
    assert rng.integers.call_count == 2 * draws


def test_a_mixed_crop_is_preferred() -> None:
    labels = torch.zeros(32, 200, dtype=torch.uint8)
    labels[:, 100:116] = 1
    recipe = SceneRecipe(crop=32)
    tops = [draw_crop(labels, Generator(Philox(i)), recipe) for i in range(40)]
    good = [has_mixed_classes(labels[:32, left : left + 32], 0.75) for _, left in tops]
    assert sum(good) >= 25  # each of ten draws hits with probability 0.19 or so: 88% of 40


def test_test_view_keeps_the_aspect() -> None:
    image = torch.full((3, 10, 30), 255, dtype=torch.uint8)
    view = render_test_view(image, RECIPE)
    assert view.shape == (3, 32, 96)
    assert view[:, 0, 0].tolist() == pytest.approx(
        [(1 - 0.485) / 0.229, (1 - 0.456) / 0.224, (1 - 0.406) / 0.225]
    )


def test_saturation_is_that_of_hsv() -> None:
    import colorsys

    generator = torch.Generator().manual_seed(0)
    image = torch.randint(0, 256, (3, 5, 5), generator=generator).float()
    image[:, 0, 0] = 70.0
    for factor in (0.5, 1.0, 1.5):
        got = scale_saturation(image, factor)
        for y in range(5):
            for x in range(5):
                h, s, v = colorsys.rgb_to_hsv(*(image[:, y, x] / 255).tolist())
                want = colorsys.hsv_to_rgb(h, min(s * factor, 1.0), v)
                assert (got[:, y, x] / 255).tolist() == pytest.approx(want, abs=1e-5)


def test_distortion() -> None:
    image = torch.randint(
        0, 256, (3, 20, 20), generator=torch.Generator().manual_seed(0), dtype=torch.uint8
    )
    assert torch.equal(distort_colors(image, Generator(Philox(0)), 0.0), image)
    changed = [distort_colors(image, Generator(Philox(i)), 0.5) for i in range(20)]
    assert all(x.dtype == torch.uint8 for x in changed)
    assert len({int(x.sum()) for x in changed}) >= 15  # none of the four in one of 16


def test_distortion_is_that_of_the_reference() -> None:
    """Red becomes green by a third of a full turn; all four changes happen."""
    draws = Mock(**{"random.return_value": 0.0, "uniform.return_value": 1.0})
    draws.integers.return_value = 60  # of 180
    red = torch.tensor([200, 0, 0], dtype=torch.uint8).view(3, 1, 1)
    assert distort_colors(red, draws, 0.5).flatten().tolist() == [1, 201, 1]
    assert draws.uniform.call_args_list == [call(-32, 32), call(0.5, 1.5), call(0.5, 1.5)]
    assert draws.integers.call_args == call(-18, 18)


def test_mini_data_set(mini: Path, tmp_path: Path) -> None:
    scenes = SceneFolder(mini, "train", num_classes=11)
    image, labels = scenes.read(0)
    digit = (labels > 0) & (labels != 255)
    assert image.float().mean(0)[digit].min() > 60 > image.float().mean(0)[labels == 0].max()
    assert 0.02 < (labels == 255).float().mean() < 0.3
    materialize_scenes(tmp_path / "again", train=6, val=2)
    files = sorted(p.relative_to(mini) for p in mini.rglob("*.*"))
    assert len(files) == 16
    assert all((mini / f).read_bytes() == (tmp_path / "again" / f).read_bytes() for f in files)


def test_bouncing() -> None:
    assert bounce_position(np.array([3.0, 12.0, -2.0, 21.0]), np.array(10.0)).tolist() == [
        3.0,
        8.0,
        2.0,
        1.0,
    ]
