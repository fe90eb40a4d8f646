"""Boxes as x1, y1, x2, y2 in pixels: coding against a reference box, clipping, generalised IoU."""

import math

import torch
from torch import Tensor
from torchvision.ops import box_area

MAX_LOG_SIZE = math.log(1000 / 16)
Stds = tuple[float, float, float, float]


def encode_deltas(boxes: Tensor, targets: Tensor, stds: Stds) -> Tensor:
    """Deltas (n, 4) that turn boxes (n, 4) into targets (n, 4): shift of the centre, log of the size, over `stds`."""
    centre, size = center_and_size(boxes)
    target_centre, target_size = center_and_size(targets)
    deltas = torch.cat([(target_centre - centre) / size, torch.log(target_size / size)], dim=-1)
    return deltas / deltas.new_tensor(stds)


def decode_deltas(boxes: Tensor, deltas: Tensor, stds: Stds) -> Tensor:
    """Inverse of `encode`; log sizes are clamped on both sides. Shapes (..., 4), broadcast."""
    scaled = deltas * deltas.new_tensor(stds)
    shift, log_size = scaled[..., :2], scaled[..., 2:]
    centre, size = center_and_size(boxes)
    half = size * log_size.clamp(-MAX_LOG_SIZE, MAX_LOG_SIZE).exp() / 2
    centre = centre + size * shift
    return torch.cat([centre - half, centre + half], dim=-1)


def center_and_size(boxes: Tensor) -> tuple[Tensor, Tensor]:
    """Centres and sizes (..., 2) of boxes (..., 4)."""
    low, high = boxes[..., :2], boxes[..., 2:]
    return (low + high) / 2, high - low


def generalized_iou(boxes: Tensor, targets: Tensor, eps: float = 1e-6) -> Tensor:
    """GIoU (n,) of pairs of boxes; union and hull are at least `eps`."""
    overlap = (
        torch.minimum(boxes[:, 2:], targets[:, 2:]) - torch.maximum(boxes[:, :2], targets[:, :2])
    ).clamp(min=0)
    hull = (
        torch.maximum(boxes[:, 2:], targets[:, 2:]) - torch.minimum(boxes[:, :2], targets[:, :2])
    ).clamp(min=0)
    intersection, enclosing = overlap.prod(dim=-1), hull.prod(dim=-1).clamp(min=eps)
    union = (box_area(boxes) + box_area(targets) - intersection).clamp(min=eps)
    return intersection / union - (enclosing - union) / enclosing
