"""Boxes and the objects they belong to: coding against a reference box, and generalized IoU.

Boxes are x1, y1, x2, y2 in pixels.
"""

import math
from dataclasses import dataclass

import torch
from torch import Tensor
from torchvision.ops import box_area

from mugs.devices import make_constant

# mmdet's limit: no box may become more than 1000 / 16 times as large or as small as its reference.
MAX_LOG_SIZE = math.log(1000 / 16)
Stds = tuple[float, float, float, float]


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


def encode_deltas(boxes: Tensor, targets: Tensor, stds: Stds) -> Tensor:
    """Return the deltas (n, 4) that turn boxes (n, 4) into targets (n, 4).

    Deltas are the shift of the center in sizes of the box, and the log of the ratio of sizes, both
    divided by `stds` so that they vary about as much as N(0, 1).
    """
    center, size = center_and_size(boxes)
    target_center, target_size = center_and_size(targets)
    deltas = torch.cat([(target_center - center) / size, torch.log(target_size / size)], dim=-1)
    return deltas / make_constant(stds, deltas.dtype, deltas.device)


def decode_deltas(boxes: Tensor, deltas: Tensor, stds: Stds) -> Tensor:
    """Return the boxes that deltas stand for: the inverse of `encode_deltas`.

    Shapes (..., 4), broadcast.
    """
    scale = make_constant(stds, deltas.dtype, deltas.device)
    shift, log_size = (deltas * scale).chunk(2, dim=-1)
    center, size = center_and_size(boxes)
    # Clamped on both sides as in mmdet; torchvision's coder clamps large sizes only.
    half = size * log_size.clamp(-MAX_LOG_SIZE, MAX_LOG_SIZE).exp() / 2
    center = center + size * shift
    return torch.cat([center - half, center + half], dim=-1)


def center_and_size(boxes: Tensor) -> tuple[Tensor, Tensor]:
    """Return the centers and sizes (..., 2) of boxes (..., 4)."""
    low, high = boxes.chunk(2, dim=-1)
    return (low + high) / 2, high - low


def generalized_iou(boxes: Tensor, targets: Tensor, eps: float = 1e-6) -> Tensor:
    """Return the GIoU (n,) of pairs of boxes (Rezatofighi et al., arXiv 1902.09630).

    Differs from torchvision's loss: union and hull are at least `eps`, as in mmdet, which keeps the
    gradient of empty boxes finite.
    """
    overlap = (
        torch.minimum(boxes[:, 2:], targets[:, 2:]) - torch.maximum(boxes[:, :2], targets[:, :2])
    ).clamp(min=0)
    hull = (
        torch.maximum(boxes[:, 2:], targets[:, 2:]) - torch.minimum(boxes[:, :2], targets[:, :2])
    ).clamp(min=0)
    intersection = overlap.prod(dim=-1)
    enclosing = hull.prod(dim=-1).clamp(min=eps)
    union = (box_area(boxes) + box_area(targets) - intersection).clamp(min=eps)
    return intersection / union - (enclosing - union) / enclosing
