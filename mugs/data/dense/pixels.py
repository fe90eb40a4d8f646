"""Resize and normalize images of the dense tasks. Sizes are (height, width)."""

import torch
from torch import Tensor
from torchvision.transforms.v2 import InterpolationMode
from torchvision.transforms.v2 import functional as F

from mugs.data.views.config import IMAGENET_MEAN, IMAGENET_STD


def fit_size(size: tuple[int, int], short_side: int, long_side: int) -> tuple[int, int]:
    """Return the size with the shorter side at `short_side` and the longer at most `long_side`.

    Rounded as in mmcv's `rescale_size`; at least one pixel.
    """
    scale = min(short_side / min(size), long_side / max(size))
    return max(int(size[0] * scale + 0.5), 1), max(int(size[1] * scale + 0.5), 1)


def resize_image(image: Tensor, size: tuple[int, int]) -> Tensor:
    """Resize uint8 (3, H, W) to (3, *size), bilinearly and without antialiasing."""
    # The reference implementations resize with OpenCV, which does not antialias.
    resized: Tensor = F.resize_image(
        image, list(size), interpolation=InterpolationMode.BILINEAR, antialias=False
    )
    return resized


def normalize_pixels(
    image: Tensor, mean: tuple[float, ...] = IMAGENET_MEAN, std: tuple[float, ...] = IMAGENET_STD
) -> Tensor:
    """Normalize values from 0 to 255 (3, H, W) to float32."""
    shift, scale = (torch.tensor(v).view(3, 1, 1) for v in (mean, std))
    return (image.float() / 255 - shift) / scale
