"""Which object each box stands for, and which boxes the losses are computed on."""

import torch
from torch import Tensor
from torchvision.ops import box_iou

from mugs.hashed_draws import hashed_bits

# Results of `match_boxes` that stand for no object. Negative, because objects count from 0.
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
    """Return the object index (n,) of each box by IoU with objects (m, 4), BACKGROUND or IGNORED.

    A box stands for its best object from an IoU of `positive` on, for the background below
    `negative`, and is ignored in between. With `promote`, the best boxes of an object (all that
    tie) stand for it from that IoU on; a box that is the best of several, for the last of them.
    """
    if len(objects) == 0 or len(boxes) == 0:
        return torch.full((len(boxes),), BACKGROUND, device=boxes.device)
    iou = box_iou(objects, boxes)
    best, index = iou.max(dim=0)
    result = torch.where(best < negative, BACKGROUND, IGNORED)
    result = torch.where(best >= positive, index, result)
    if promote is not None:
        top = iou.max(dim=1, keepdim=True).values
        # mmdet assigns object by object, so a later object overwrites an earlier one. Here `argmax`
        # finds the first of the flipped rows, which is the last object.
        promoted = ((iou == top) & (top >= promote)).flip(0)
        last = len(objects) - 1 - promoted.to(torch.uint8).argmax(dim=0)
        result = torch.where(promoted.any(dim=0), last, result)
    return result


def sample_matches(
    matched: Tensor, num: int, positive_share: float, key: int
) -> tuple[Tensor, Tensor]:
    """Choose at most `num` boxes at random: indices of positives and of background boxes.

    At most `num * positive_share` are positive; background boxes fill the rest.
    """
    # A function of `key` and of the box's place alone: the choice does not depend on the rank, nor
    # on the other images of the batch.
    draw = hashed_bits(key, len(matched), matched.device)
    positives = _draw(matched >= 0, int(num * positive_share), draw)
    return positives, _draw(matched == BACKGROUND, num - len(positives), draw)


def _draw(mask: Tensor, count: int, draw: Tensor) -> Tensor:
    indices = mask.nonzero()[:, 0]
    if len(indices) <= count:
        return indices
    # Boxes with the smallest draws win. Sorted again, so that the order of boxes is kept.
    return indices[draw[indices].argsort()[:count]].sort().values
