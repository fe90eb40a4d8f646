"""From an image and its label map to a training crop, or to the input of the test.

Every draw is a function of (seed, epoch, image). Resizing is bilinear without antialias for images (the reference
uses OpenCV, which has none) and nearest for label maps. Images are uint8 (3, H, W), label maps uint8 (H, W).
"""

import torch
import torch.nn.functional as tf
from numpy.random import Generator
from torch import Tensor
from torchvision.transforms.v2 import InterpolationMode
from torchvision.transforms.v2 import functional as F

from mugs.data.plan import generator, uniform
from mugs.data.recipe import IMAGENET_MEAN, IMAGENET_STD
from mugs.transfer.label_maps import VOID
from mugs.transfer.segmentation.photometric import distort
from mugs.transfer.segmentation.recipe import SceneRecipe

SCENE_CROP = 210  # crop number of the generator, beyond those of pretraining and probes
TRIES = 10


def fitted_size(height: int, width: int, long_side: int, short_side: int) -> tuple[int, int]:
    """Height and width scaled to fit into the two, the aspect kept up to rounding; at least one pixel."""
    scale = min(long_side / max(height, width), short_side / min(height, width))
    return max(int(height * scale + 0.5), 1), max(int(width * scale + 0.5), 1)


def training_view(
    image: Tensor, labels: Tensor, *, seed: int, epoch: int, sample: int, recipe: SceneRecipe
) -> tuple[Tensor, Tensor]:
    """Normalised float crop (3, S, S) and its label map (S, S), int64; what the crop lacks is zero and void."""
    rng = generator(seed, epoch, sample, SCENE_CROP)
    ratio = uniform(rng, *recipe.ratio)
    size = fitted_size(labels.shape[0], labels.shape[1], int(recipe.long_side * ratio), int(recipe.short_side * ratio))
    image, labels = resize_image(image, size), resize_labels(labels, size)
    top, left = draw_crop(labels, rng, recipe)
    image = image[:, top : top + recipe.crop, left : left + recipe.crop]
    labels = labels[top : top + recipe.crop, left : left + recipe.crop]
    if rng.random() < recipe.flip_prob:
        image, labels = image.flip(-1), labels.flip(-1)
    pixels = normalised(distort(image, rng, recipe.photometric_prob))
    missing = (0, recipe.crop - labels.shape[1], 0, recipe.crop - labels.shape[0])
    return tf.pad(pixels, missing), tf.pad(labels, missing, value=VOID).long()


def whole_view(image: Tensor, recipe: SceneRecipe) -> Tensor:
    """Normalised float image, scaled to fit."""
    return normalised(
        resize_image(image, fitted_size(image.shape[1], image.shape[2], recipe.long_side, recipe.short_side))
    )


def draw_crop(labels: Tensor, rng: Generator, recipe: SceneRecipe) -> tuple[int, int]:
    """Top and left of the crop: the first of ten that is mixed enough, else an eleventh."""
    height, width = labels.shape
    for tries in range(TRIES + 1):
        top = int(rng.integers(max(height - recipe.crop, 0) + 1))
        left = int(rng.integers(max(width - recipe.crop, 0) + 1))
        part = labels[top : top + recipe.crop, left : left + recipe.crop]
        if recipe.max_class_share >= 1 or tries == TRIES or mixed(part, recipe.max_class_share):
            break
    return top, left


def mixed(labels: Tensor, share: float) -> bool:
    """Whether there are two classes or more, none with this share of the pixels that are not void."""
    counts = torch.bincount(labels.flatten().int(), minlength=VOID + 1)[:VOID]
    return int((counts > 0).sum()) > 1 and int(counts.max()) < share * int(counts.sum())


def resize_image(image: Tensor, size: tuple[int, int]) -> Tensor:
    """Bilinear, no antialias."""
    resized: Tensor = F.resize_image(image, list(size), interpolation=InterpolationMode.BILINEAR, antialias=False)
    return resized


def resize_labels(labels: Tensor, size: tuple[int, int]) -> Tensor:
    """Nearest."""
    resized: Tensor = F.resize_mask(labels[None], list(size))
    return resized[0]


def normalised(image: Tensor) -> Tensor:
    """Float image with ImageNet's mean and standard deviation."""
    mean, std = (torch.tensor(v).view(3, 1, 1) for v in (IMAGENET_MEAN, IMAGENET_STD))
    return image.float().div_(255).sub_(mean).div_(std)
