"""Noise of erased boxes: a hash of (seed, epoch, sample, crop, pixel), turned into N(0, 1).

It is drawn on the CPU, so it has the same bits whatever device the views are on. The workers of the
loader make the uniform draws, `mugs.data.loading.batch` the noise of a whole batch from them; so it
costs the training step two copies and one write whatever the number of boxes.
"""

from collections.abc import Sequence

import numpy as np

from mugs.data.views.boxes import BoxDraws, ErasedBox
from mugs.data.views.render.compiled import cached_njit
from mugs.random_streams import (
    GAMMA,
    MULTIPLIER_1,
    MULTIPLIER_2,
    derive_erase_key,
    make_image_key,
)

# Unsigned and of numpy: numba turns an unsigned with a signed integer into a float.
HASH_STEP = np.uint64(GAMMA)
FIRST_FACTOR = np.uint64(MULTIPLIER_1)
SECOND_FACTOR = np.uint64(MULTIPLIER_2)
LOW_24_BITS = np.uint64(0xFFFFFF)


def draw_boxes(seed: int, epoch: int, sample: int, erased: Sequence[ErasedBox]) -> BoxDraws:
    """Return the draws for the erased boxes of an image."""
    image_key = make_image_key(seed, epoch, sample)
    keys = np.array([derive_erase_key(image_key, box.number) for box in erased], dtype=np.uint64)
    boxes = np.array([(*box.box, box.start, box.size) for box in erased], dtype=np.int64)
    boxes = boxes.reshape(len(erased), 6)
    count = int((3 * boxes[:, 2] * boxes[:, 3]).sum())
    draws = BoxDraws(np.empty((2, count), np.float32), np.empty(count, np.int64))
    hash_boxes(keys, boxes, *draws)
    return draws


@cached_njit
def hash_boxes(
    keys: np.ndarray, boxes: np.ndarray, uniforms: np.ndarray, places: np.ndarray
) -> None:
    """Write two draws from U(0, 1) for each value of each box, and the place of the value.

    The draws are 24 bits each of splitmix64 of a counter, as `mugs.hashed_draws.hashed_bits`.
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
