"""Crop and bicubic resize, equal to Pillow's: antialiased, 22-bit weights, horizontal pass first, bytes between."""

import math

import numpy as np

from mugs.data.views.render.compiled import cached_njit

BITS = 22
HALF = 1 << (BITS - 1)


@cached_njit
def resample_crop(
    planes: np.ndarray, box: tuple[int, int, int, int], mirror: bool, flip: bool, out: np.ndarray
) -> None:
    """Box (left, top, width, height) of planes (3, W, H), seen mirrored if asked, -> out (3, S, S), flipped if asked.

    Pixels outside the box play no part, as if it had been cut out first.
    """
    left, top, width, height = box
    size, last = out.shape[1], planes.shape[1] - 1
    first_x, count_x, weight_x = resample_weights(width, size)
    first_y, count_y, weight_y = resample_weights(height, size)
    columns, rows = np.empty((size, height), np.uint8), np.empty((height, size), np.uint8)
    sums = np.empty(max(height, size), np.int32)
    for channel in range(3):
        for x in range(size):
            sums[:height] = HALF
            for tap in range(count_x[x]):
                source = left + first_x[x] + tap
                column = planes[channel, last - source if mirror else source, top : top + height]
                weight = weight_x[x, tap]
                for y in range(height):
                    sums[y] += weight * column[y]
            round_sums_to_bytes(sums, columns[size - 1 - x if flip else x])
        for y in range(height):
            for x in range(size):
                rows[y, x] = columns[x, y]
        for y in range(size):
            sums[:size] = HALF
            for tap in range(count_y[y]):
                row, weight = rows[first_y[y] + tap], weight_y[y, tap]
                for x in range(size):
                    sums[x] += weight * row[x]
            round_sums_to_bytes(sums, out[channel, y])


@cached_njit
def round_sums_to_bytes(sums: np.ndarray, line: np.ndarray) -> None:
    """Round the sums of a line."""
    for i in range(len(line)):
        line[i] = min(max(sums[i] >> BITS, 0), 255)


@cached_njit
def resample_weights(length: int, size: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """First source pixel, number of taps and weights (size, taps) of each output pixel."""
    scale = length / size
    stretch = max(scale, 1.0)
    support = 2.0 * stretch
    taps = math.ceil(support) * 2 + 1
    first, count = np.empty(size, np.int64), np.empty(size, np.int64)
    fixed, exact = np.empty((size, taps), np.int32), np.empty(taps)
    for position in range(size):
        center = (position + 0.5) * scale
        low = max(int(center - support + 0.5), 0)
        high = min(int(center + support + 0.5), length)
        total = 0.0
        for tap in range(high - low):
            exact[tap] = keys_cubic_half((tap + low - center + 0.5) / stretch)
            total += exact[tap]
        for tap in range(high - low):
            value = exact[tap] / total * (1 << BITS)
            fixed[position, tap] = int(value - 0.5) if value < 0 else int(value + 0.5)
        first[position], count[position] = low, high - low
    return first, count, fixed


@cached_njit
def keys_cubic_half(x: float) -> float:
    """Keys' kernel with a = -0.5."""
    x = abs(x)
    if x < 1:
        return (1.5 * x - 2.5) * x * x + 1
    if x < 2:
        return -0.5 * (((x - 5) * x + 8) * x - 4)
    return 0.0
