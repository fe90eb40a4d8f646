"""The objects of a training image, and those found in a test image."""

from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True)
class Targets:
    """Objects of one image: boxes (n, 4), labels (n,) from 0, masks (n, H, W) of 0 and 1.

    Boxes are x1, y1, x2, y2 in pixels. size: height and width of the image and of the masks,
    without padding. key: what the random choices on this image are a function of.
    """

    boxes: Tensor
    labels: Tensor
    masks: Tensor
    size: tuple[int, int]
    key: int


@dataclass(frozen=True)
class Detections:
    """Found objects, best first: boxes (n, 4), scores (n,), labels (n,), masks (n, H, W) bool."""

    boxes: Tensor
    scores: Tensor
    labels: Tensor
    masks: Tensor
