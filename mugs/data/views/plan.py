"""Draw every random choice of an image's views before a pixel is touched.

A plan is a pure function of (seed, epoch, sample, image size, recipe). Each crop has a random
stream of its own, so it does not matter which worker, rank or restart draws it, and two renderers
can follow one plan.
"""

import math
from dataclasses import dataclass

from numpy.random import Generator

from mugs.data.views.config import ViewRecipe
from mugs.random_streams import SampleStream, draw_uniform, make_generator, switch_stream

Box = tuple[int, int, int, int]
# Number of the first small crop in random streams, however many large crops there are.
FIRST_SMALL_CROP = 4

# The increasing operation set of the released RandAugment. The order is part of every result: a
# plan draws indices into it.
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
    """One RandAugment operation: its parameter and its interpolation.

    The parameter is in degrees (rotate), bits kept (posterize), a threshold (solarize), levels
    added (solarize_add), a factor (color, contrast, brightness, sharpness), a slope (shear) or a
    share of the image (translate).
    """

    name: str
    value: float
    bicubic: bool


@dataclass(frozen=True)
class CropPlan:
    """One crop.

    box is left, top, width and height in source pixels; erase is x, y, width and height in crop
    pixels, with width 0 for no box. jitter holds (operation, value) in order; operations are 0
    brightness, 1 contrast, 2 saturation and 3 hue. blur is a radius in pixels, 0 for none. The box
    is resized with a bilinear or else a bicubic filter.
    """

    size: int
    box: Box
    flip: bool
    strong: bool
    jitter: tuple[tuple[int, float], ...] = ()
    gray: bool = False
    blur: float = 0.0
    solarize: bool = False
    operations: tuple[Operation, ...] = ()
    erase: Box = (0, 0, 0, 0)
    bilinear: bool = False


@dataclass(frozen=True)
class ViewPlan:
    """All crops of an image: the large ones (the teacher's first), then the small ones.

    weak: the large student crops are weak.
    """

    crops: tuple[CropPlan, ...]
    weak: bool


def plan_views(
    seed: int, epoch: int, sample: int, width: int, height: int, recipe: ViewRecipe
) -> ViewPlan:
    """Draw the views of one image of the given size in pixels."""
    rng = make_generator(seed, epoch, sample, SampleStream.VIEW_STRENGTH)
    fresh = dict(rng.bit_generator.state)
    # strong[0] is for both large student crops, strong[1 + i] for small crop i. "Greater than" is
    # the release's rule: its `prob` is the share of weak views (M12).
    strong = rng.random(1 + recipe.num_small) > recipe.weak_prob
    if recipe.student_strength_draw == "per_image":
        strong[:] = strong[0]
    if recipe.large_crops == "shared":
        strong[0] = False
        # The release's weak-only option leaves small crops strong as often as without it (M13).
        if recipe.weak_only_small == "weak":
            strong[:] = False

    crops: list[CropPlan] = []
    # The teacher's crops, 0 and 1, are always weak. Of either network one crop is of kind weak-1
    # and one of kind weak-2.
    for index in range(recipe.num_large):
        switch_stream(rng, fresh, SampleStream.CROPS + index)
        kind = index % 2
        if kind == 1 and recipe.min_overlap > 0:
            box = draw_overlapping_box(rng, width, height, crops[-1].box, recipe)
        else:
            box = draw_crop_box(rng, width, height, recipe.large_scale, recipe.ratio)
        draw = draw_strong_crop if index >= 2 and strong[0] else draw_weak_crop
        crops.append(draw(rng, recipe.large_size, box, kind, recipe))
    for index, is_strong in enumerate(strong[1:]):
        switch_stream(rng, fresh, SampleStream.CROPS + FIRST_SMALL_CROP + index)
        box = draw_crop_box(rng, width, height, recipe.small_scale, recipe.ratio)
        draw = draw_strong_crop if is_strong else draw_weak_crop
        crops.append(draw(rng, recipe.small_size, box, 2, recipe))
    return ViewPlan(tuple(crops), weak=not strong[0])


def draw_crop_box(
    rng: Generator, width: int, height: int, scale: tuple[float, float], ratio: tuple[float, float]
) -> Box:
    """Draw a box as torchvision's RandomResizedCrop: ten tries, then the largest centered box.

    `scale` are shares of the image's area and `ratio` are limits of width / height.
    """
    for _ in range(10):
        box = propose_crop_box(rng, width, height, scale, ratio)
        if box is not None:
            return box
    # At most one of the two is cut: the one that makes the image too wide or too high.
    w = min(width, max(1, round(height * ratio[1])))
    h = min(height, max(1, round(width / ratio[0])))
    return (width - w) // 2, (height - h) // 2, w, h


def propose_crop_box(
    rng: Generator, width: int, height: int, scale: tuple[float, float], ratio: tuple[float, float]
) -> Box | None:
    """Draw area, log-uniform aspect and place of a box; return None if it exceeds the image."""
    area = width * height * draw_uniform(rng, *scale)
    aspect = math.exp(draw_uniform(rng, math.log(ratio[0]), math.log(ratio[1])))
    w = round(math.sqrt(area * aspect))
    h = round(math.sqrt(area / aspect))
    if 0 < w <= width and 0 < h <= height:
        return int(rng.integers(0, width - w + 1)), int(rng.integers(0, height - h + 1)), w, h
    return None


def draw_overlapping_box(
    rng: Generator, width: int, height: int, other: Box, recipe: ViewRecipe
) -> Box:
    """Draw a large crop's box until its IoU with `other` exceeds `min_overlap`.

    After 1,000 tries it is the whole image: of an image ten times as wide as high, no box of the
    usual aspect and scale may fit.
    """
    for _ in range(1000):
        box = propose_crop_box(rng, width, height, recipe.large_scale, recipe.ratio)
        if box is not None and intersect_over_union(box, other) > recipe.min_overlap:
            return box
    return 0, 0, width, height


def intersect_over_union(one: Box, other: Box) -> float:
    """Return the intersection of two boxes as a share of their union."""
    wide = min(one[0] + one[2], other[0] + other[2]) - max(one[0], other[0])
    high = min(one[1] + one[3], other[1] + other[3]) - max(one[1], other[1])
    shared = max(wide, 0) * max(high, 0)
    return shared / (one[2] * one[3] + other[2] * other[3] - shared)


def draw_weak_crop(rng: Generator, size: int, box: Box, kind: int, recipe: ViewRecipe) -> CropPlan:
    """Draw a weak view of kind 0 (weak-1), 1 (weak-2, sometimes solarized) or 2 (weak-local)."""
    flip = rng.random() < recipe.flip_prob
    jitter: tuple[tuple[int, float], ...] = ()
    if rng.random() < recipe.jitter_prob:
        # Factors around 1 for brightness, contrast and saturation, a shift around 0 for the hue.
        values = [
            draw_uniform(rng, center - reach, center + reach)
            for center, reach in zip((1, 1, 1, 0), recipe.jitter, strict=True)
        ]
        jitter = tuple((op, values[op]) for op in rng.permutation(4).tolist())
    gray = rng.random() < recipe.gray_prob
    radius = draw_uniform(rng, *recipe.blur_radius)
    blur = radius if rng.random() < recipe.blur_prob[kind] else 0.0
    solarize = kind == 1 and rng.random() < recipe.solarize_prob
    bilinear = recipe.interpolation == "bilinear"
    return CropPlan(size, box, flip, False, jitter, gray, blur, solarize, bilinear=bilinear)


def draw_strong_crop(
    rng: Generator, size: int, box: Box, kind: int, recipe: ViewRecipe
) -> CropPlan:
    """Draw a strong view: flip, RandAugment on the whole image, the crop, random erasing.

    `kind` has no effect; it is there so that weak and strong views are drawn alike.
    """
    flip = rng.random() < recipe.flip_prob
    # The release never draws an operation twice, timm may (M14).
    chosen = rng.choice(
        len(OPERATIONS), recipe.randaugment_num, replace=recipe.randaugment_replacement
    )
    operations = tuple(
        draw_operation(rng, OPERATIONS[index], recipe)
        for index in chosen
        if rng.random() < recipe.randaugment_prob
    )
    erase = draw_erase_box(rng, size) if rng.random() < recipe.erase_prob else (0, 0, 0, 0)
    bilinear = recipe.interpolation == "bilinear"
    return CropPlan(size, box, flip, True, operations=operations, erase=erase, bilinear=bilinear)


def draw_operation(rng: Generator, name: str, recipe: ViewRecipe) -> Operation:
    """Draw the parameter of an operation, its sign and its interpolation.

    The magnitude is from N(mean, std), clipped to 0 to 10. Its meaning is that of timm's
    "rand-m9-mstd0.5-inc1": at 10 the factors are 1 +- 0.9, the angle 30 degrees, the slope 0.3, the
    shift 0.45 of the image.
    """
    magnitude = min(max(rng.normal(*recipe.randaugment_magnitude), 0.0), 10.0)
    # Drawn for every operation, used or not, so that the draws after it do not depend on the name.
    sign = -1.0 if rng.random() < 0.5 else 1.0
    bicubic = rng.random() < 0.5
    match name:
        case "posterize":
            # At magnitude 10 no bit is kept, which gives a black image.
            value = 4.0 - int(0.4 * magnitude)
        case "solarize":
            value = 256.0 - int(25.6 * magnitude)
        case "solarize_add":
            value = float(int(11 * magnitude))
        case "color" | "contrast" | "brightness" | "sharpness":
            value = 1 + sign * 0.09 * magnitude
        case "rotate":
            value = sign * 3 * magnitude
        case _:
            value = sign * magnitude * (0.03 if name.startswith("shear") else 0.045)
    return Operation(name, value, bicubic)


def draw_erase_box(rng: Generator, size: int) -> Box:
    """Draw one box of area U(0.02, 1/3) and log-uniform aspect 0.3 to 1 / 0.3, in ten tries.

    The limits are those of timm's RandomErasing. Return (0, 0, 0, 0) if none of the ten fits.
    """
    for _ in range(10):
        area = draw_uniform(rng, 0.02, 1 / 3) * size * size
        aspect = math.exp(draw_uniform(rng, math.log(0.3), math.log(1 / 0.3)))
        h = round(math.sqrt(area * aspect))
        w = round(math.sqrt(area / aspect))
        if w < size and h < size:
            return int(rng.integers(0, size - w + 1)), int(rng.integers(0, size - h + 1)), w, h
    return 0, 0, 0, 0
