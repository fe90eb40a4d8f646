"""Training views: a plan is drawn first, then applied to pixels, boxes and masks alike."""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from numpy.random import Generator
from torch import Tensor
from torchvision.ops import clip_boxes_to_image
from torchvision.transforms.v2.functional import crop_image, crop_mask, resize_mask

from mugs.data.dense.pixels import fit_size, resize_image
from mugs.transfer.detection.boxes import Targets
from mugs.transfer.detection.config import Scales


def typical_view_size(scales: Scales, multiple: int) -> tuple[int, int]:
    """Return height and width of a 4:3 view of the mean shorter side, padded to multiples.

    Only the estimate of the floating-point operations uses it.
    """
    short = sum(scales.short_sides) / len(scales.short_sides)
    sides = fit_size((3, 4), round(short), scales.max_side)
    return -(-sides[0] // multiple) * multiple, -(-sides[1] // multiple) * multiple


@dataclass(frozen=True)
class DetectionViewPlan:
    """What is done to an image, in this order; crop is (top, left, height, width).

    Sizes are (height, width).
    """

    flip: bool
    first: tuple[int, int] | None
    crop: tuple[int, int, int, int] | None
    size: tuple[int, int]


def draw_detection_plan(rng: Generator, size: tuple[int, int], scales: Scales) -> DetectionViewPlan:
    """Draw the random choices for an image of (height, width)."""
    flip = bool(rng.random() < scales.flip_prob)
    if rng.random() >= scales.crop_prob:
        return DetectionViewPlan(
            flip, None, None, fit_size(size, int(rng.choice(scales.short_sides)), scales.max_side)
        )
    first = fit_size(size, int(rng.choice(scales.crop_short_sides)), scales.max_side)
    low, high = scales.crop_sides
    # The two sides of the crop are drawn independently; a view of it may contain no object.
    sides = [int(rng.integers(min(side, low), min(side, high) + 1)) for side in first]
    place = [int(rng.integers(0, side - cut + 1)) for side, cut in zip(first, sides, strict=True)]
    last = fit_size((sides[0], sides[1]), int(rng.choice(scales.short_sides)), scales.max_side)
    return DetectionViewPlan(flip, first, (place[0], place[1], sides[0], sides[1]), last)


def apply_detection_plan(
    plan: DetectionViewPlan, image: Tensor, boxes: Tensor, labels: Tensor, masks: Tensor, key: int
) -> tuple[Tensor, Targets]:
    """Apply a plan to an image (3, H, W), boxes (n, 4), labels (n,) and masks (n, H, W).

    Image and masks are uint8. Returns the view and the objects in it. Boxes are cut at the crop;
    an object whose box is outside of it is dropped.
    """
    if plan.flip:
        image = image.flip(-1)
        masks = masks.flip(-1)
        width = image.shape[-1]
        boxes = torch.stack(
            [width - boxes[:, 2], boxes[:, 1], width - boxes[:, 0], boxes[:, 3]], dim=1
        )
    if plan.first is not None and plan.crop is not None:
        image, boxes, masks = resize_view(image, boxes, masks, plan.first)
        top, left, height, width = plan.crop
        image = crop_image(image, *plan.crop)
        masks = crop_mask(masks, *plan.crop)
        boxes = clip_boxes_to_image(
            boxes - boxes.new_tensor([left, top, left, top]), (height, width)
        )
        # By the box, as in mmdet: a mask without a pixel in the crop may stay.
        left_over = (boxes[:, 2] > boxes[:, 0]) & (boxes[:, 3] > boxes[:, 1])
        boxes, labels, masks = boxes[left_over], labels[left_over], masks[left_over]
    image, boxes, masks = resize_view(image, boxes, masks, plan.size)
    return image, Targets(boxes, labels, masks, plan.size, key)


def resize_view(
    image: Tensor, boxes: Tensor, masks: Tensor, size: tuple[int, int]
) -> tuple[Tensor, Tensor, Tensor]:
    """Resize image, boxes and masks to (height, width); masks by nearest neighbor."""
    # Width and height have scales of their own, because `size` is rounded.
    scale = boxes.new_tensor([size[1] / image.shape[-1], size[0] / image.shape[-2]] * 2)
    masks = resize_mask(masks, list(size)) if len(masks) else masks.new_zeros(0, *size)
    return resize_image(image, size), boxes * scale, masks


def pad_batch(images: list[Tensor], multiple: int) -> Tensor:
    """Pad normalized images with zeros, right and below, to one batch (N, 3, H, W).

    Its sides are the next multiples of `multiple`.
    """
    height, width = (
        -(-max(image.shape[d] for image in images) // multiple) * multiple for d in (1, 2)
    )
    return torch.stack(
        [F.pad(image, (0, width - image.shape[2], 0, height - image.shape[1])) for image in images]
    )
