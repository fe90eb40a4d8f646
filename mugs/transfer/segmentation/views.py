"""From an image and its label map to a training crop, or to the input of the test.

Every draw is a function of (seed, epoch, image). Images are uint8 (3, H, W), label maps uint8
(H, W).
"""

import torch
import torch.nn.functional as F
from numpy.random import Generator
from torch import Tensor
from torchvision.transforms.v2.functional import resize_mask

from mugs.data.dense.label_maps import VOID
from mugs.data.dense.pixels import fit_size, normalize_pixels, resize_image
from mugs.random_streams import SampleStream, draw_uniform, make_generator
from mugs.transfer.segmentation.config import SceneRecipe
from mugs.transfer.segmentation.photometric import distort_colors

TRIES = 10  # mmsegmentation's number of crops before it takes any


def render_training_crop(
    image: Tensor, labels: Tensor, *, seed: int, epoch: int, sample: int, recipe: SceneRecipe
) -> tuple[Tensor, Tensor]:
    """Return a normalized float crop (3, S, S) and its label map (S, S), int64.

    Where the image is smaller than the crop, pixels are zero and labels void.
    """
    rng = make_generator(seed, epoch, sample, SampleStream.SCENE_VIEW)
    ratio = draw_uniform(rng, *recipe.ratio)
    size = (labels.shape[0], labels.shape[1])
    size = fit_size(size, int(recipe.short_side * ratio), int(recipe.long_side * ratio))
    image, labels = resize_image(image, size), resize_labels(labels, size)
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
        part = labels[top : top + recipe.crop, left : left + recipe.crop]
        if (
            recipe.max_class_share >= 1
            or tries == TRIES
            or has_mixed_classes(part, recipe.max_class_share)
        ):
            break
    return top, left


def has_mixed_classes(labels: Tensor, share: float) -> bool:
    """Tell whether there are two classes or more, none with this share of the known pixels."""
    # VOID is the last count and left out.
    counts = torch.bincount(labels.flatten().int(), minlength=VOID + 1)[:VOID]
    return int((counts > 0).sum()) > 1 and int(counts.max()) < share * int(counts.sum())


def resize_labels(labels: Tensor, size: tuple[int, int]) -> Tensor:
    """Resize a label map to (height, width) by nearest neighbor."""
    resized: Tensor = resize_mask(labels[None], list(size))
    return resized[0]
