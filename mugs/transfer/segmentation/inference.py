"""Sliding-window inference: logits of overlapping windows, averaged where they overlap."""

from collections.abc import Callable
from itertools import product

import torch
from torch import Tensor

from mugs.transfer.segmentation.heads import resize_bilinear

Logits = Callable[[Tensor], Tensor]


def window_starts(length: int, window: int, stride: int) -> list[int]:
    """First pixels of the windows along a side; the last one ends where the side does."""
    count = max(length - window + stride - 1, 0) // stride + 1
    return [max(min(index * stride, length - window), 0) for index in range(count)]


def slide_windows(
    logits: Logits, image: Tensor, *, num_classes: int, window: int, stride: int, at_once: int = 4
) -> Tensor:
    """Logits (K, H, W) of an image (3, H, W): the sum over windows divided by how many cover a pixel.

    logits: (n, 3, h, w) -> (n, K, h, w). A side shorter than the window is taken whole. `at_once` windows run together.
    """
    height, width = image.shape[1:]
    tall, wide = min(window, height), min(window, width)
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
    """Classes (height, width) of logits (K, h, w): resized, then the arg max; `at_once` classes are in memory."""
    best = torch.full((height, width), float("-inf"), device=logits.device)
    label = torch.zeros(height, width, dtype=torch.int64, device=logits.device)
    for first in range(0, len(logits), at_once):
        value, index = resize_bilinear(logits[None, first : first + at_once], (height, width))[
            0
        ].max(dim=0)
        better = value > best
        best = torch.where(better, value, best)
        label = torch.where(better, index + first, label)
    return label
