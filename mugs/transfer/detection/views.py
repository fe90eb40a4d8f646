"""Training views and test images: what is done to an image is drawn first, then applied to pixels, boxes and masks."""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from numpy.random import Generator
from torch import Tensor
from torchvision.ops import clip_boxes_to_image
from torchvision.transforms.v2.functional import crop_image, crop_mask, resize_mask

from mugs.data.dense.pixels import fit_size, resize_image
from mugs.transfer.detection.config import Scales
from mugs.transfer.detection.targets import Targets


def typical_view_size(scales: Scales, multiple: int) -> tuple[int, int]:
    """Height and width of a view of 4 to 3 with the mean shorter side, padded to multiples."""
    short = sum(scales.short_sides) / len(scales.short_sides)
    sides = fit_size((3, 4), round(short), scales.max_side)
    return -(-sides[0] // multiple) * multiple, -(-sides[1] // multiple) * multiple


@dataclass(frozen=True)
class DetectionViewPlan:
    """What becomes of an image, in order; sizes are (height, width), the crop is top, left, height, width."""

    flip: bool
    first: tuple[int, int] | None
    crop: tuple[int, int, int, int] | None
    size: tuple[int, int]


def draw_view_plan(rng: Generator, size: tuple[int, int], scales: Scales) -> DetectionViewPlan:
    """The random choices for an image of (height, width)."""
    flip = bool(rng.random() < scales.flip_prob)
    if rng.random() >= scales.crop_prob:
        return DetectionViewPlan(
            flip, None, None, fit_size(size, int(rng.choice(scales.short_sides)), scales.max_side)
        )
    first = fit_size(size, int(rng.choice(scales.crop_short_sides)), scales.max_side)
    low, high = scales.crop_sides
    sides = [int(rng.integers(min(side, low), min(side, high) + 1)) for side in first]
    place = [int(rng.integers(0, side - cut + 1)) for side, cut in zip(first, sides, strict=True)]
    last = fit_size((sides[0], sides[1]), int(rng.choice(scales.short_sides)), scales.max_side)
    return DetectionViewPlan(flip, first, (place[0], place[1], sides[0], sides[1]), last)


def apply_view_plan(
    plan: DetectionViewPlan, image: Tensor, boxes: Tensor, labels: Tensor, masks: Tensor, key: int
) -> tuple[Tensor, Targets]:
    """Image uint8 (3, H, W), boxes (n, 4), labels (n,), masks uint8 (n, H, W) -> view and what is left in it.

    Boxes are cut at the crop; objects of which no box is left are dropped.
    """
    if plan.flip:
        image, masks = image.flip(-1), masks.flip(-1)
        width = image.shape[-1]
        boxes = torch.stack(
            [width - boxes[:, 2], boxes[:, 1], width - boxes[:, 0], boxes[:, 3]], dim=1
        )
    if plan.first is not None and plan.crop is not None:
        image, boxes, masks = resize_view(image, boxes, masks, plan.first)
        top, left, height, width = plan.crop
        image, masks = crop_image(image, *plan.crop), crop_mask(masks, *plan.crop)
        boxes = clip_boxes_to_image(
            boxes - boxes.new_tensor([left, top, left, top]), (height, width)
        )
        left_over = (boxes[:, 2] > boxes[:, 0]) & (boxes[:, 3] > boxes[:, 1])
        boxes, labels, masks = boxes[left_over], labels[left_over], masks[left_over]
    image, boxes, masks = resize_view(image, boxes, masks, plan.size)
    return image, Targets(boxes, labels, masks, plan.size, key)


def resize_view(
    image: Tensor, boxes: Tensor, masks: Tensor, size: tuple[int, int]
) -> tuple[Tensor, Tensor, Tensor]:
    """To (height, width), nearest for masks."""
    scale = boxes.new_tensor([size[1] / image.shape[-1], size[0] / image.shape[-2]] * 2)
    masks = resize_mask(masks, list(size)) if len(masks) else masks.new_zeros(0, *size)
    return resize_image(image, size), boxes * scale, masks


def pad_batch(images: list[Tensor], multiple: int) -> Tensor:
    """Normalised images as one batch (N, 3, H, W), zeros right and below, sides the next multiples of `multiple`."""
    height, width = (
        -(-max(image.shape[d] for image in images) // multiple) * multiple for d in (1, 2)
    )
    batch = [
        F.pad(image, (0, width - image.shape[2], 0, height - image.shape[1])) for image in images
    ]
    return torch.stack(batch)
