"""Noise of erased boxes: a hash of (seed, epoch, sample, crop, pixel), turned into N(0, 1).

It is drawn on the CPU, so it has the same bits whatever device the views are on, and in the threads
that render, so it costs the training step two copies and one write whatever the number of boxes.
"""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from mugs.data.views.plan import Box
from mugs.data.views.render.compiled import cached_njit
from mugs.random_streams import (
    GAMMA,
    MULTIPLIER_1,
    MULTIPLIER_2,
    box_muller,
    derive_erase_key,
    make_image_key,
)

# Unsigned and of numpy: numba turns an unsigned with a signed integer into a float.
HASH_STEP = np.uint64(GAMMA)
FIRST_FACTOR = np.uint64(MULTIPLIER_1)
SECOND_FACTOR = np.uint64(MULTIPLIER_2)
LOW_24_BITS = np.uint64(0xFFFFFF)


class ErasedBox(NamedTuple):
    """A box of a crop: the crop's number in random streams, and where its pixels are stored.

    The crop is three planes of `size` x `size` values that begin at `start` in the batch.
    """

    number: int
    box: Box
    start: int
    size: int


class BoxNoise(NamedTuple):
    """Values (E,) float32, and the places (E,) int64 in the views of a batch that they go to.

    Places count the values of the large crops and then those of the small ones, as they are stored.
    """

    values: Tensor
    places: Tensor


NO_NOISE = BoxNoise(torch.empty(0), torch.empty(0, dtype=torch.int64))


def draw_box_noise(seed: int, epoch: int, sample: int, erased: Sequence[ErasedBox]) -> BoxNoise:
    """Return the noise in the erased boxes of an image."""
    image_key = make_image_key(seed, epoch, sample)
    keys = np.array([derive_erase_key(image_key, box.number) for box in erased], dtype=np.uint64)
    boxes = np.array([(*box.box, box.start, box.size) for box in erased], dtype=np.int64)
    boxes = boxes.reshape(len(erased), 6)
    count = int((3 * boxes[:, 2] * boxes[:, 3]).sum())
    uniforms = np.empty((2, count), np.float32)
    places = np.empty(count, np.int64)
    hash_boxes(keys, boxes, uniforms, places)
    # Logarithm and cosine are torch's: those of numba differ in the last bit.
    return BoxNoise(box_muller(*torch.from_numpy(uniforms)), torch.from_numpy(places))


def join_noise(parts: Sequence[BoxNoise]) -> BoxNoise:
    """Return the noise of several images, in page-locked memory where there is a GPU."""

    def join(tensors: list[Tensor]) -> Tensor:
        out = torch.empty(
            sum(map(len, tensors)), dtype=tensors[0].dtype, pin_memory=torch.cuda.is_available()
        )
        return torch.cat(tensors, out=out)

    return BoxNoise(join([part.values for part in parts]), join([part.places for part in parts]))


@cached_njit
def hash_boxes(
    keys: np.ndarray, boxes: np.ndarray, uniforms: np.ndarray, places: np.ndarray
) -> None:
    """Write two draws from U(0, 1) for each value of each box, and the place of the value.

    The draws are 24 bits each of splitmix64 of a counter, as `mugs.random_streams.hashed_bits`.
    """
    element = 0
    for index in range(len(keys)):
        left, top, width, height, start, size = boxes[index]
        value = keys[index]
        for channel in range(3):
            for row in range(height):
                place = start + (channel * size + top + row) * size + left
                for column in range(width):
                    bits = (value ^ (value >> np.uint64(30))) * FIRST_FACTOR
                    bits = (bits ^ (bits >> np.uint64(27))) * SECOND_FACTOR
                    bits = bits ^ (bits >> np.uint64(31))
                    low = np.float32(bits & LOW_24_BITS)
                    high = np.float32((bits >> np.uint64(24)) & LOW_24_BITS)
                    # The half keeps the first draw away from 0, where the logarithm is infinite.
                    uniforms[0, element] = (low + np.float32(0.5)) / np.float32(1 << 24)
                    uniforms[1, element] = high / np.float32(1 << 24)
                    places[element] = place + column
                    element += 1
                    value += HASH_STEP
