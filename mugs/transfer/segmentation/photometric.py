"""Photometric distortion of mmsegmentation: brightness, contrast, saturation and hue, each now or never.

Differs: saturation and hue are computed without rounding to 8-bit HSV; levels are rounded where it truncates them.
"""

import torch
from numpy.random import Generator
from torch import Tensor
from torchvision.transforms.v2 import functional as F

BRIGHTNESS = 32.0
CONTRAST = SATURATION = (0.5, 1.5)
HUE = 18  # of 180 for a full turn


def distort_colors(image: Tensor, rng: Generator, prob: float) -> Tensor:
    """uint8 (3, H, W) -> the same, distorted. Contrast comes second or last, by a coin."""
    x = image.float()
    if rng.random() < prob:
        x = _bytes(x + rng.uniform(-BRIGHTNESS, BRIGHTNESS))
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
    """The saturation of HSV times a factor, at most 1; value and hue stay. Float (3, H, W), 0 to 255."""
    value = image.amax(dim=0)
    spread = value - image.amin(dim=0)
    most = value / spread.clamp(min=1e-6)  # factor at which the saturation is 1
    return value - (value - image) * most.clamp(max=factor)


def _bytes(x: Tensor) -> Tensor:
    return x.round().clamp(0, 255)
