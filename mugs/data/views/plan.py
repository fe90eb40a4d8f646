"""Every random choice of an image's views, drawn before a pixel is touched.

A plan is a pure function of (seed, epoch, sample, image size, recipe): each crop has a counter-based generator of its
own, so it does not matter which worker, rank or restart draws it.
"""

import math
from dataclasses import dataclass

from numpy.random import Generator

from mugs.data.views.config import ViewRecipe
from mugs.random_streams import SampleStream, draw_uniform, make_generator, switch_stream

OPERATIONS = (
    "auto_contrast",
    "equalize",
    "invert",
    "rotate",
    "posterize",
    "solarize",
    "solarize_add",
    "color",
    "contrast",
    "brightness",
    "sharpness",
    "shear_x",
    "shear_y",
    "translate_x",
    "translate_y",
)


@dataclass(frozen=True)
class Operation:
    """One RandAugment operation: its parameter (degrees, bits, threshold, factor, shear, share) and interpolation."""

    name: str
    value: float
    bicubic: bool


@dataclass(frozen=True)
class CropPlan:
    """One crop. Box (left, top, width, height) in source pixels; erase box (x, y, w, h) in crop pixels.

    jitter: (operation, value) in order, operations 0 brightness, 1 contrast, 2 saturation, 3 hue.
    """

    size: int
    box: tuple[int, int, int, int]
    flip: bool
    strong: bool
    jitter: tuple[tuple[int, float], ...] = ()
    gray: bool = False
    blur: float = 0.0
    solarize: bool = False
    operations: tuple[Operation, ...] = ()
    erase: tuple[int, int, int, int] = (0, 0, 0, 0)


@dataclass(frozen=True)
class ViewPlan:
    """Crops in order teacher 0, teacher 1, student 0, student 1, small ...; weak: the large student crops are weak."""

    crops: tuple[CropPlan, ...]
    weak: bool


def draw_view_plan(
    seed: int, epoch: int, sample: int, width: int, height: int, recipe: ViewRecipe
) -> ViewPlan:
    """The views of one image of the given size in pixels."""
    rng = make_generator(seed, epoch, sample, SampleStream.VIEW_STRENGTH)
    fresh = dict(rng.bit_generator.state)
    coins = rng.random(1 + recipe.num_small)
    strong = coins > recipe.weak_prob
    if recipe.student_coin == "per_image":
        strong[:] = strong[0]
    if recipe.weak_only:
        strong[0] = False
        if recipe.weak_only_small == "weak":
            strong[:] = False

    def crop(
        index: int, size: int, scale: tuple[float, float], kind: int, is_strong: bool
    ) -> CropPlan:
        switch_stream(rng, fresh, SampleStream.CROPS + index)
        draw = draw_strong_crop if is_strong else draw_weak_crop
        return draw(rng, size, draw_crop_box(rng, width, height, scale, recipe.ratio), kind, recipe)

    large = recipe.large_size
    crops = [
        crop(i, large, recipe.large_scale, i % 2, i >= 2 and bool(strong[0])) for i in range(4)
    ]
    if recipe.weak_only:
        crops[2:] = crops[:2]
    for i in range(recipe.num_small):
        crops.append(crop(4 + i, recipe.small_size, recipe.small_scale, 2, bool(strong[1 + i])))
    return ViewPlan(tuple(crops), weak=not strong[0])


def draw_crop_box(
    rng: Generator, width: int, height: int, scale: tuple[float, float], ratio: tuple[float, float]
) -> tuple[int, int, int, int]:
    """torchvision's RandomResizedCrop: ten tries, then the largest centred box within the ratios."""
    log_ratio = (math.log(ratio[0]), math.log(ratio[1]))
    for _ in range(10):
        area = width * height * draw_uniform(rng, *scale)
        aspect = math.exp(draw_uniform(rng, *log_ratio))
        w, h = round(math.sqrt(area * aspect)), round(math.sqrt(area / aspect))
        if 0 < w <= width and 0 < h <= height:
            return int(rng.integers(0, width - w + 1)), int(rng.integers(0, height - h + 1)), w, h
    w, h = width, height
    if width / height < ratio[0]:
        h = min(height, max(1, round(width / ratio[0])))
    elif width / height > ratio[1]:
        w = min(width, max(1, round(height * ratio[1])))
    return (width - w) // 2, (height - h) // 2, w, h


def draw_weak_crop(
    rng: Generator, size: int, box: tuple[int, int, int, int], kind: int, recipe: ViewRecipe
) -> CropPlan:
    """Weak view of kind 0 (weak-1, always blurred), 1 (weak-2, solarised at times) or 2 (weak-local)."""
    flip = rng.random() < recipe.flip_prob
    jitter: tuple[tuple[int, float], ...] = ()
    if rng.random() < recipe.jitter_prob:
        values = [
            draw_uniform(rng, center - s, center + s)
            for center, s in zip((1, 1, 1, 0), recipe.jitter, strict=True)
        ]
        jitter = tuple((op, values[op]) for op in rng.permutation(4).tolist())
    gray = rng.random() < recipe.gray_prob
    radius = draw_uniform(rng, *recipe.blur_radius)
    blur = radius if rng.random() < recipe.blur_prob[kind] else 0.0
    solarize = kind == 1 and rng.random() < recipe.solarize_prob
    return CropPlan(size, box, flip, False, jitter, gray, blur, solarize)


def draw_strong_crop(
    rng: Generator, size: int, box: tuple[int, int, int, int], kind: int, recipe: ViewRecipe
) -> CropPlan:
    """Strong view: flip, RandAugment on the whole image, the crop, random erasing."""
    flip = rng.random() < recipe.flip_prob
    chosen = rng.choice(len(OPERATIONS), 2, replace=recipe.randaugment_replacement)
    operations = tuple(
        draw_operation(rng, OPERATIONS[index], recipe) for index in chosen if rng.random() < 0.5
    )
    erase = draw_erase_box(rng, size) if rng.random() < recipe.erase_prob else (0, 0, 0, 0)
    return CropPlan(size, box, flip, True, operations=operations, erase=erase)


def draw_operation(rng: Generator, name: str, recipe: ViewRecipe) -> Operation:
    """An operation with its parameter at a magnitude from N(mean, std) clipped to [0, 10], and a random sign."""
    magnitude = min(max(rng.normal(*recipe.randaugment_magnitude), 0.0), 10.0)
    sign = -1.0 if rng.random() < 0.5 else 1.0
    bicubic = rng.random() < 0.5
    if name == "posterize":
        value = 4.0 - int(0.4 * magnitude)
    elif name == "solarize":
        value = 256.0 - int(25.6 * magnitude)
    elif name == "solarize_add":
        value = float(int(11 * magnitude))
    elif name in ("color", "contrast", "brightness", "sharpness"):
        value = 1 + sign * 0.09 * magnitude
    elif name == "rotate":
        value = sign * 3 * magnitude
    else:
        value = sign * magnitude * (0.03 if name.startswith("shear") else 0.045)
    return Operation(name, value, bicubic)


def draw_erase_box(rng: Generator, size: int) -> tuple[int, int, int, int]:
    """One box of area U(0.02, 1/3) and log-uniform aspect 0.3 to 3.33, ten tries; (0, 0, 0, 0) when none fits."""
    for _ in range(10):
        area = draw_uniform(rng, 0.02, 1 / 3) * size * size
        aspect = math.exp(draw_uniform(rng, math.log(0.3), math.log(1 / 0.3)))
        h, w = round(math.sqrt(area * aspect)), round(math.sqrt(area / aspect))
        if w < size and h < size:
            return int(rng.integers(0, size - w + 1)), int(rng.integers(0, size - h + 1)), w, h
    return 0, 0, 0, 0
