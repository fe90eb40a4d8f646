"""Boxes as x1, y1, x2, y2 in pixels: coding against a reference box, clipping, generalised IoU."""

import math

import torch
from torch import Tensor
from torchvision.ops import box_iou

from mugs.random_streams import hashed_bits

MAX_LOG_SIZE = math.log(1000 / 16)
Stds = tuple[float, float, float, float]

BACKGROUND = -1
IGNORED = -2


def encode(boxes: Tensor, targets: Tensor, stds: Stds) -> Tensor:
    """Deltas (n, 4) that turn boxes (n, 4) into targets (n, 4): shift of the centre, log of the size, over `stds`."""
    centre, size = centre_size(boxes)
    target_centre, target_size = centre_size(targets)
    deltas = torch.cat([(target_centre - centre) / size, torch.log(target_size / size)], dim=-1)
    return deltas / deltas.new_tensor(stds)


def decode(boxes: Tensor, deltas: Tensor, stds: Stds) -> Tensor:
    """Inverse of `encode`; log sizes are clamped on both sides. Shapes (..., 4), broadcast."""
    scaled = deltas * deltas.new_tensor(stds)
    shift, log_size = scaled[..., :2], scaled[..., 2:]
    centre, size = centre_size(boxes)
    half = size * log_size.clamp(-MAX_LOG_SIZE, MAX_LOG_SIZE).exp() / 2
    centre = centre + size * shift
    return torch.cat([centre - half, centre + half], dim=-1)


def centre_size(boxes: Tensor) -> tuple[Tensor, Tensor]:
    """Centres and sizes (..., 2) of boxes (..., 4)."""
    low, high = boxes[..., :2], boxes[..., 2:]
    return (low + high) / 2, high - low


def clip(boxes: Tensor, size: tuple[int, int]) -> Tensor:
    """Boxes (..., 4) moved into an image of height and width `size`."""
    height, width = size
    return torch.minimum(boxes.clamp(min=0), boxes.new_tensor([width, height, width, height]))


def generalized_iou(boxes: Tensor, targets: Tensor, eps: float = 1e-6) -> Tensor:
    """GIoU (n,) of pairs of boxes; union and hull are at least `eps`."""
    overlap = (
        torch.minimum(boxes[:, 2:], targets[:, 2:]) - torch.maximum(boxes[:, :2], targets[:, :2])
    ).clamp(min=0)
    hull = (
        torch.maximum(boxes[:, 2:], targets[:, 2:]) - torch.minimum(boxes[:, :2], targets[:, :2])
    ).clamp(min=0)
    intersection, enclosing = overlap.prod(dim=-1), hull.prod(dim=-1).clamp(min=eps)
    union = (area(boxes) + area(targets) - intersection).clamp(min=eps)
    return intersection / union - (enclosing - union) / enclosing


def area(boxes: Tensor) -> Tensor:
    """Areas (...) of boxes (..., 4)."""
    return (boxes[..., 2] - boxes[..., 0]) * (boxes[..., 3] - boxes[..., 1])


SCALE = 8


RATIOS = (0.5, 1.0, 2.0)  # height over width


def level_anchors(rows: int, columns: int, stride: int, device: torch.device) -> Tensor:
    """(rows * columns * 3, 4) in the order of a map's cells, ratios last. The stride is that of the level, not
    image size over map size: the two differ where a side is no multiple of the largest stride."""
    root = torch.tensor(RATIOS, device=device).sqrt()
    half = SCALE * stride / 2 * torch.stack([1 / root, root], dim=-1)
    base = torch.cat([-half, half], dim=-1)
    y, x = (torch.arange(n, device=device) * stride for n in (rows, columns))
    corner = torch.stack(torch.meshgrid(x, y, indexing="xy"), dim=-1).view(-1, 1, 2)
    return (torch.cat([corner, corner], dim=-1) + base).view(-1, 4)


def inside(anchors: Tensor, size: tuple[int, int]) -> Tensor:
    """Whether each anchor (n, 4) lies within an image of height and width `size`, padding excluded."""
    height, width = size
    fits = [anchors[:, 0] >= 0, anchors[:, 1] >= 0, anchors[:, 2] < width, anchors[:, 3] < height]
    return torch.stack(fits).all(dim=0)


def match(
    boxes: Tensor,
    objects: Tensor,
    *,
    positive: float,
    negative: float,
    promote: float | None = None,
) -> Tensor:
    """Object index (n,) of each box, BACKGROUND or IGNORED, by IoU with objects (m, 4).

    IoU >= positive: the best object; < negative: background; between: ignored. With `promote`, an object's best boxes
    (all that tie) stand for it where their IoU is at least that; of several such objects the last.
    """
    if len(objects) == 0 or len(boxes) == 0:
        return torch.full((len(boxes),), BACKGROUND, device=boxes.device)
    iou = box_iou(objects, boxes)
    best, index = iou.max(dim=0)
    unsure = torch.where(best < negative, BACKGROUND, IGNORED)
    result = torch.where(best >= positive, index, unsure)
    if promote is not None:
        top = iou.max(dim=1, keepdim=True).values
        promoted = ((iou == top) & (top >= promote)).flip(0)
        last = len(objects) - 1 - promoted.to(torch.uint8).argmax(dim=0)
        result = torch.where(promoted.any(dim=0), last, result)
    return result


def sample(matched: Tensor, num: int, positive_share: float, key: int) -> tuple[Tensor, Tensor]:
    """Indices of at most `num` boxes, positives and background apart; background fills what positives leave.

    Where there are more than wanted they are drawn at random, as a function of `key` and the box's place alone.
    """
    draw = hashed_bits(key, len(matched), matched.device)
    positives = _draw(matched >= 0, int(num * positive_share), draw)
    return positives, _draw(matched == BACKGROUND, num - len(positives), draw)


def _draw(mask: Tensor, count: int, draw: Tensor) -> Tensor:
    indices = mask.nonzero()[:, 0]
    if len(indices) <= count:
        return indices
    return indices[draw[indices].argsort()[:count]].sort().values
