"""What the dense tasks do to the pixels of an image. Sizes are (height, width)."""

import torch
from torch import Tensor
from torchvision.transforms.v2 import InterpolationMode
from torchvision.transforms.v2 import functional as F

from mugs.data.views.config import IMAGENET_MEAN, IMAGENET_STD


def fit_size(size: tuple[int, int], short_side: int, long_side: int) -> tuple[int, int]:
    """Size with the shorter side at `short_side`, or less where the longer one would exceed `long_side`.

    Rounded, at least one pixel.
    """
    scale = min(short_side / min(size), long_side / max(size))
    return max(int(size[0] * scale + 0.5), 1), max(int(size[1] * scale + 0.5), 1)


def resize_image(image: Tensor, size: tuple[int, int]) -> Tensor:
    """uint8 (3, H, W) -> uint8 (3, *size): bilinear without antialias (the references use OpenCV, which has none)."""
    resized: Tensor = F.resize_image(
        image, list(size), interpolation=InterpolationMode.BILINEAR, antialias=False
    )
    return resized


def normalize_pixels(
    image: Tensor, mean: tuple[float, ...] = IMAGENET_MEAN, std: tuple[float, ...] = IMAGENET_STD
) -> Tensor:
    """Values from 0 to 255 (3, H, W) -> float32 of that mean and standard deviation."""
    shift, scale = (torch.tensor(v).view(3, 1, 1) for v in (mean, std))
    return (image.float() / 255 - shift) / scale
