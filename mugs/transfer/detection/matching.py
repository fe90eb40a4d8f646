"""Which object each box stands for, and which boxes the losses are computed on."""

import torch
from torch import Tensor
from torchvision.ops import box_iou

from mugs.random_streams import hashed_bits

BACKGROUND = -1


IGNORED = -2


def match_boxes(
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


def sample_matches(
    matched: Tensor, num: int, positive_share: float, key: int
) -> tuple[Tensor, Tensor]:
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
