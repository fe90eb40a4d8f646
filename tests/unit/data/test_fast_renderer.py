"""The compiled renderer gives the bytes of the PIL reference, whatever the plan."""

import itertools
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageOps

from mugs.data.views.config import ViewRecipe
from mugs.data.views.plan import (
    OPERATIONS,
    CropPlan,
    Operation,
    draw_crop_box,
    draw_operation,
    plan_views,
)
from mugs.data.views.render import compiled, fast, reference
from mugs.data.views.render.hue import rotate_hue
from mugs.data.views.render.randaugment import GEOMETRIC, augment_region

RECIPE = ViewRecipe(large_size=64, small_size=24, num_small=6)


def photograph(width: int, height: int, seed: int = 0) -> Image.Image:
    """Smooth colors with grain, clipped at both ends."""
    rng = np.random.default_rng(seed)
    coarse = (
        rng.integers(-60, 316, (max(height // 9, 2), max(width // 9, 2), 3))
        .clip(0, 255)
        .astype(np.uint8)
    )
    smooth = np.asarray(
        Image.fromarray(coarse).resize((width, height), Image.Resampling.BICUBIC)
    ).astype(int)
    return Image.fromarray((smooth + rng.normal(0, 9, smooth.shape)).clip(0, 255).astype(np.uint8))


PHOTOGRAPH = photograph(187, 141)


def assert_same(crop: CropPlan, image: Image.Image = PHOTOGRAPH) -> None:
    whole, out = fast.to_planes(image), np.empty((3, crop.size, crop.size), np.uint8)
    fast.render_crop_compiled(whole, crop, out)
    expected = np.asarray(reference.render_crop_pil(image, crop)).transpose(2, 0, 1)
    np.testing.assert_array_equal(out, expected, err_msg=str(crop))


def strong(
    rng: np.random.Generator, operations: tuple[Operation, ...], image: Image.Image = PHOTOGRAPH
) -> CropPlan:
    box = draw_crop_box(rng, *image.size, (0.05, 1.0), (3 / 4, 4 / 3))
    return CropPlan(
        int(rng.integers(8, 80)), box, bool(rng.random() < 0.5), True, operations=operations
    )


@pytest.mark.parametrize("name", OPERATIONS)
def test_each_operation(name: str) -> None:
    rng = np.random.default_rng(OPERATIONS.index(name))
    for _ in range(12):
        assert_same(strong(rng, (draw_operation(rng, name, RECIPE),)))


@pytest.mark.parametrize("first", OPERATIONS)
def test_all_pairs(first: str) -> None:
    rng = np.random.default_rng(100 + OPERATIONS.index(first))
    for second, _ in itertools.product(OPERATIONS, range(2)):
        assert_same(
            strong(rng, (draw_operation(rng, first, RECIPE), draw_operation(rng, second, RECIPE)))
        )


@pytest.mark.parametrize("num", [1, 3, 5])
def test_other_numbers_of_operations(num: int) -> None:
    """Statistics after several tables, and after operations that move or mix pixels."""
    rng = np.random.default_rng(num)
    statistical = ("auto_contrast", "equalize", "contrast")
    for number in range(40):
        names = list(rng.choice(OPERATIONS, num))
        names[-1] = statistical[number % 3]
        crop = strong(rng, tuple(draw_operation(rng, str(name), RECIPE) for name in names))
        assert_same(replace(crop, box=(0, 0, *PHOTOGRAPH.size)) if number % 4 == 0 else crop)


# The largest angle, slope and share of the image that RandAugment draws.
LARGEST = {"rotate": 30.0, "shear_x": 0.3, "shear_y": 0.3, "translate_x": 0.45, "translate_y": 0.45}
ODD_SIZES = [(1, 200), (200, 1), (20, 40), (33, 77), (101, 99), (60, 140), (7, 3), (160, 30)]


def draw_geometric(rng: np.random.Generator) -> Operation:
    """An operation whose moves are whole, or nearly so, more often than a drawn one's."""
    name = str(rng.choice(GEOMETRIC))
    share = float(rng.choice([1, 1, 1 - 1e-9, 1 / 3, 2 / 3, 5 / 9, 0.5, rng.random()]))
    return Operation(name, float(rng.choice([-1, 1])) * share * LARGEST[name], rng.random() < 0.5)


@pytest.mark.parametrize("size", ODD_SIZES)
def test_geometry_at_the_ends_of_its_ranges(size: tuple[int, int]) -> None:
    """250 boxes a size, before any resize, which would hide most differences of one level."""
    image, rng = photograph(*size), np.random.default_rng(size)
    whole = fast.to_planes(image)
    for number in range(250):
        operations = tuple(draw_geometric(rng) for _ in range(1 + number % 2))
        flip = bool(rng.random() < 0.5)
        box = draw_crop_box(rng, *size, (0.05, 1.0), (3 / 4, 4 / 3))
        expected = ImageOps.mirror(image) if flip else image
        for operation in operations:
            expected = reference.apply_operation_pil(expected, operation)
        left, top, wide, high = box
        np.testing.assert_array_equal(
            augment_region(whole, flip, operations, box).transpose(2, 1, 0),
            np.asarray(expected)[top : top + high, left : left + wide],
            err_msg=f"{operations}, box {box}, mirrored: {flip}",
        )


@pytest.mark.parametrize("bits", [0.0, 1.0, 4.0])
def test_posterize_down_to_no_bits(bits: float) -> None:
    assert_same(strong(np.random.default_rng(0), (Operation("posterize", bits, bicubic=False),)))


@pytest.mark.parametrize(
    ("operation", "value"),
    [
        *itertools.product(range(3), (0.05, 0.6, 0.99, 1.0, 1.4)),
        *itertools.product([3], (-0.1, -0.003, 0.07)),
    ],
)
def test_jitter(operation: int, value: float) -> None:
    assert_same(
        CropPlan(60, (20, 10, 120, 100), flip=True, strong=False, jitter=((operation, value),))
    )


def test_hue_of_every_kind_of_colour() -> None:
    """64 levels a channel, at both ends of the shifts that the recipe draws and between."""
    levels = np.arange(0, 256, 4, dtype=np.uint8)
    colors = np.stack(np.meshgrid(levels, levels, levels), axis=-1).reshape(512, 512, 3)
    for shift in (-0.1, -0.05, 0.03, 0.1):
        crop = CropPlan(512, (0, 0, 512, 512), flip=False, strong=False, jitter=((3, shift),))
        assert_same(crop, Image.fromarray(colors))


@pytest.mark.long
def test_hue_of_every_colour_at_every_shift() -> None:
    """All 16.7 million, a million at a time,
    by the 51 steps between the ends that the recipe draws.
    """
    for first in range(0, 1 << 24, 1 << 20):
        number = np.arange(first, first + (1 << 20)).reshape(1024, 1024)
        colors = np.stack([number >> 16, number >> 8 & 255, number & 255], axis=-1).astype(np.uint8)
        turned = np.array(Image.fromarray(colors).convert("HSV"))
        turned[..., 0] -= 25  # modulo 256
        for shift in range(-25, 26):
            planes = colors.transpose(2, 1, 0).copy()
            rotate_hue(planes, shift)
            assert np.array_equal(
                planes.transpose(2, 1, 0), Image.fromarray(turned, "HSV").convert("RGB")
            )
            turned[..., 0] += 1


@pytest.mark.parametrize("radius", [0.1, 0.3, 0.77, 1.0, 1.5, 2.0, 6.3])
def test_blur(radius: float) -> None:
    assert_same(CropPlan(50, (0, 0, 187, 141), flip=False, strong=False, blur=radius))


@pytest.mark.parametrize(
    "box", [(0, 0, 187, 141), (3, 5, 40, 120), (3, 5, 120, 40), (9, 9, 64, 64), (186, 140, 1, 1)]
)
def test_resize_up_and_down(box: tuple[int, int, int, int]) -> None:
    """Also where Pillow 13 would take the columns first."""
    for size, flip, bilinear in itertools.product((1, 17, 64, 96), (False, True), (False, True)):
        assert_same(CropPlan(size, box, flip, strong=False, bilinear=bilinear))


@pytest.mark.parametrize("size", [(1, 1), (1, 7), (9, 1), (3, 2), (300, 5)])
def test_small_and_narrow_images(size: tuple[int, int]) -> None:
    image, rng = photograph(*size), np.random.default_rng(1)
    assert_same(
        CropPlan(16, (0, 0, *size), flip=True, strong=False, gray=True, blur=1.2, solarize=True),
        image,
    )
    for name in OPERATIONS:
        for other in ("equalize", "rotate"):
            operations = draw_operation(rng, name, RECIPE), draw_operation(rng, other, RECIPE)
            assert_same(strong(rng, operations, image), image)


def test_images_of_one_colour() -> None:
    image, rng = Image.new("RGB", (20, 15), (10, 200, 77)), np.random.default_rng(2)
    for name in OPERATIONS:
        assert_same(
            strong(
                rng, (draw_operation(rng, name, RECIPE), Operation("equalize", 0, False)), image
            ),
            image,
        )


@pytest.mark.parametrize("interpolation", ["bicubic", "bilinear"])
@pytest.mark.parametrize("weak_prob", [0.0, 0.5, 1.0])
def test_views_of_the_recipe(weak_prob: float, interpolation: str) -> None:
    """All crops of drawn plans, from several threads at once."""
    recipe = replace(RECIPE, weak_prob=weak_prob, interpolation=interpolation)

    def compare(sample: int) -> None:
        image = photograph(90 + 13 * sample, 200 - 11 * sample, sample)
        plan = plan_views(1, 2, sample, *image.size, recipe)
        views = [
            (np.empty((4, 3, 64, 64), np.uint8), np.empty((6, 3, 24, 24), np.uint8))
            for _ in range(2)
        ]
        fast.render_views_compiled(image, plan, *views[0])
        reference.render_views_pil(image, plan, *views[1])
        for ours, theirs in zip(*views, strict=True):
            np.testing.assert_array_equal(ours, theirs)

    with ThreadPoolExecutor(4) as pool:
        list(pool.map(compare, range(12)))


@pytest.mark.parametrize("planted", ["", "open to others", "a link", "a file"])
def test_kernels_are_loaded_from_our_own_folder_only(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, planted: str
) -> None:
    """Numba runs what lies there, and NUMBA_CACHE_DIR may be a folder that others write in."""
    monkeypatch.setattr(compiled.config, "CACHE_DIR", str(tmp_path))
    folder = compiled.kernel_cache_dir()
    assert folder is not None and folder.parent == tmp_path
    assert folder.stat().st_mode & 0o777 == 0o700
    assert compiled.kernel_cache_dir() == folder
    if planted:
        folder.rename(tmp_path / "before")
        if planted == "open to others":
            folder.mkdir()
            folder.chmod(0o777)
        elif planted == "a link":
            folder.symlink_to("before")
        else:
            folder.touch()
        assert compiled.kernel_cache_dir() is None
