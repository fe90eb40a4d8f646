"""Sliding-window inference: logits of overlapping windows, averaged where they overlap."""

from collections.abc import Callable
from itertools import product

import torch
from torch import Tensor

from mugs.transfer.segmentation.heads import resize_bilinear

LogitsFunction = Callable[[Tensor], Tensor]


def window_starts(length: int, window: int, stride: int) -> list[int]:
    """Return the first pixels of the windows along a side; the last one ends with the side."""
    count = max(length - window + stride - 1, 0) // stride + 1
    return [max(min(index * stride, length - window), 0) for index in range(count)]


def slide_windows(
    logits: LogitsFunction,
    image: Tensor,
    *,
    num_classes: int,
    window: int,
    stride: int,
    at_once: int = 4,
) -> Tensor:
    """Return logits (K, H, W) of an image (3, H, W): the mean over the windows that cover a pixel.

    logits: maps (n, 3, h, w) to (n, K, h, w). A side shorter than the window is taken whole.
    `at_once` windows run together.
    """
    height, width = image.shape[1:]
    tall = min(window, height)
    wide = min(window, width)
    corners = list(
        product(window_starts(height, window, stride), window_starts(width, window, stride))
    )
    total = torch.zeros(num_classes, height, width, device=image.device)
    cover = torch.zeros(height, width, device=image.device)
    for first in range(0, len(corners), at_once):
        some = corners[first : first + at_once]
        scores = logits(torch.stack([image[:, y : y + tall, x : x + wide] for y, x in some]))
        for (y, x), score in zip(some, scores, strict=True):
            total[:, y : y + tall, x : x + wide] += score
            cover[y : y + tall, x : x + wide] += 1
    return total / cover


def argmax_at_size(logits: Tensor, height: int, width: int, *, at_once: int = 16) -> Tensor:
    """Resize logits (K, h, w) and return the classes (height, width) with the largest ones."""
    # Some classes at a time: 150 maps at the size of a photograph would need gigabytes.
    best = torch.full((height, width), float("-inf"), device=logits.device)
    label = torch.zeros(height, width, dtype=torch.int64, device=logits.device)
    for first in range(0, len(logits), at_once):
        value, index = resize_bilinear(logits[None, first : first + at_once], (height, width))[
            0
        ].max(dim=0)
        # Strictly larger: of equal logits the first class wins, as in one `argmax`.
        better = value > best
        best = torch.where(better, value, best)
        label = torch.where(better, index + first, label)
    return label
