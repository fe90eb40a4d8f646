"""What is known of a training image, and what is found in a test image."""

from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True)
class Targets:
    """Objects of one image: boxes (n, 4) as x1, y1, x2, y2 in pixels, labels (n,) from 0, masks (n, H, W) of 0 and 1.

    size: height and width of the image without padding; the masks have it too. key: what the image's random choices are
    a function of.
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
