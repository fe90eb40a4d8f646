"""Photometric distortion of mmsegmentation: brightness, contrast, saturation and hue.

Differs: saturation and hue are computed without rounding to 8-bit HSV, and levels are rounded where
mmsegmentation truncates them.
"""

import torch
from numpy.random import Generator
from torch import Tensor
from torchvision.transforms.v2 import functional as F

# mmsegmentation's defaults.
BRIGHTNESS = 32.0  # levels of 255
CONTRAST = SATURATION = (0.5, 1.5)
HUE = 18  # of 180 for a full turn, OpenCV's unit


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
        x = _bytes(F.adjust_hue(x / 255, int(rng.integers(-HUE, HUE)) / 180) * 255)
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
