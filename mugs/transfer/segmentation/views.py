"""From an image and its label map to a training crop, or to the input of the test.

Every draw is a function of (seed, epoch, image). Images are uint8 (3, H, W), label maps uint8
(H, W).

The photometric distortion is mmsegmentation's. Differs: saturation and hue are computed without
rounding to 8-bit HSV, and levels are rounded where mmsegmentation truncates them.
"""

import torch
import torch.nn.functional as F
from numpy.random import Generator
from torch import Tensor
from torchvision.transforms.v2.functional import adjust_hue, resize_mask

from mugs.data.dense.label_maps import VOID
from mugs.data.dense.pixels import fit_size, normalize_pixels, resize_image
from mugs.random_streams import SampleStream, draw_uniform, make_generator
from mugs.transfer.segmentation.config import SceneRecipe

TRIES = 10  # mmsegmentation's number of crops before it takes any
# mmsegmentation's defaults.
BRIGHTNESS = 32.0  # levels of 255
CONTRAST = SATURATION = (0.5, 1.5)
HUE = 18  # of 180 for a full turn, OpenCV's unit


def render_training_crop(
    image: Tensor, labels: Tensor, *, seed: int, epoch: int, sample: int, recipe: SceneRecipe
) -> tuple[Tensor, Tensor]:
    """Return a normalized float crop (3, S, S) and its label map (S, S), int64.

    Where the image is smaller than the crop, pixels are zero and labels void.
    """
    rng = make_generator(seed, epoch, sample, SampleStream.SCENE_VIEW)
    ratio = draw_uniform(rng, *recipe.ratio)
    size = fit_size(
        (labels.shape[0], labels.shape[1]),
        int(recipe.short_side * ratio),
        int(recipe.long_side * ratio),
    )
    image = resize_image(image, size)
    labels = resize_mask(labels[None], list(size))[0]  # by nearest neighbor
    top, left = draw_crop(labels, rng, recipe)
    image = image[:, top : top + recipe.crop, left : left + recipe.crop]
    labels = labels[top : top + recipe.crop, left : left + recipe.crop]
    if rng.random() < recipe.flip_prob:
        image = image.flip(-1)
        labels = labels.flip(-1)
    pixels = normalize_pixels(distort_colors(image, rng, recipe.photometric_prob))
    # Padded after normalizing, so that padding has the mean color.
    missing = (0, recipe.crop - labels.shape[1], 0, recipe.crop - labels.shape[0])
    return F.pad(pixels, missing), F.pad(labels, missing, value=VOID).long()


def render_test_view(image: Tensor, recipe: SceneRecipe) -> Tensor:
    """Return the normalized float image, scaled to fit the recipe's sides."""
    size = fit_size((image.shape[1], image.shape[2]), recipe.short_side, recipe.long_side)
    return normalize_pixels(resize_image(image, size))


def draw_crop(labels: Tensor, rng: Generator, recipe: SceneRecipe) -> tuple[int, int]:
    """Return top and left of the crop: the first of ten that is mixed enough, else an eleventh."""
    height, width = labels.shape
    for tries in range(TRIES + 1):
        top = int(rng.integers(max(height - recipe.crop, 0) + 1))
        left = int(rng.integers(max(width - recipe.crop, 0) + 1))
        if (
            recipe.max_class_share >= 1
            or tries == TRIES
            or has_mixed_classes(
                labels[top : top + recipe.crop, left : left + recipe.crop], recipe.max_class_share
            )
        ):
            break
    return top, left


def has_mixed_classes(labels: Tensor, share: float) -> bool:
    """Tell whether there are two classes or more, none with this share of the known pixels."""
    # VOID is the last count and left out.
    counts = torch.bincount(labels.flatten().int(), minlength=VOID + 1)[:VOID]
    return int((counts > 0).sum()) > 1 and int(counts.max()) < share * int(counts.sum())


def distort_colors(image: Tensor, rng: Generator, prob: float) -> Tensor:
    """Distort an image uint8 (3, H, W); each change happens with probability `prob`."""
    x = image.float()
    if rng.random() < prob:
        x = _bytes(x + rng.uniform(-BRIGHTNESS, BRIGHTNESS))
    # Contrast comes second or last, each with probability one half. It is drawn here in both cases,
    # so that the order of the draws is fixed.
    contrast = float(rng.uniform(*CONTRAST)) if rng.random() < prob else 1.0
    contrast_last = rng.random() < 0.5
    if not contrast_last:
        x = _bytes(x * contrast)
    if rng.random() < prob:
        x = _bytes(scale_saturation(x, float(rng.uniform(*SATURATION))))
    if rng.random() < prob:
        x = _bytes(adjust_hue(x / 255, int(rng.integers(-HUE, HUE)) / 180) * 255)
    if contrast_last:
        x = _bytes(x * contrast)
    return x.to(torch.uint8)


def scale_saturation(image: Tensor, factor: float) -> Tensor:
    """Multiply the saturation (of HSV) of an image (3, H, W), 0 to 255, by a factor.

    The result is at most 1; value and hue stay.
    """
    # In HSV the saturation is (value - min) / value with value = max. Scaling every channel's
    # distance to the value scales it and keeps the hue.
    value = image.amax(dim=0)
    spread = value - image.amin(dim=0)
    most = value / spread.clamp(min=1e-6)  # factor at which the saturation is 1
    return value - (value - image) * most.clamp(max=factor)


def _bytes(x: Tensor) -> Tensor:
    return x.round().clamp(0, 255)
