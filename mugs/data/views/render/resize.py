"""Crop and bicubic or bilinear resize, equal to Pillow's.

Antialiased: when an image shrinks, the kernel is stretched by the scale. Weights are fixed-point
numbers of 22 bits, the horizontal pass comes first, and its results are rounded to bytes.
"""

import math

import numpy as np

from mugs.data.views.render.compiled import cached_njit

# Pillow's PRECISION_BITS: 32 - 8 bits of a pixel - 2 bits for weights beyond 0 to 1.
BITS = 22
HALF = 1 << (BITS - 1)


@cached_njit
def resample_crop(
    planes: np.ndarray,
    box: tuple[int, int, int, int],
    mirror: bool,
    flip: bool,
    bilinear: bool,
    out: np.ndarray,
) -> None:
    """Resize a box of planes (3, W, H) to out (3, S, S).

    Pixels outside the box have no effect, as if it had been cut out first.

    Args:
        planes: transposed planes of the whole image.
        box: left, top, width and height.
        mirror: take the box from the mirrored image.
        flip: mirror the result.
        bilinear: weigh pixels with a triangle, else with Keys' cubic.
        out: planes of the crop, not transposed.
    """
    left, top, width, height = box
    size = out.shape[1]
    last = planes.shape[1] - 1
    first_x, count_x, weight_x = resample_weights(width, size, bilinear)
    first_y, count_y, weight_y = resample_weights(height, size, bilinear)
    columns = np.empty((size, height), np.uint8)
    rows = np.empty((height, size), np.uint8)
    sums = np.empty(max(height, size), np.int32)
    for channel in range(3):
        # Horizontal pass: each output column is a weighted sum of whole source columns, which are
        # contiguous. So the innermost loop vectorizes, whatever the number of taps.
        for x in range(size):
            sums[:height] = HALF
            for tap in range(count_x[x]):
                source = left + first_x[x] + tap
                column = planes[channel, last - source if mirror else source, top : top + height]
                weight = weight_x[x, tap]
                for y in range(height):
                    sums[y] += weight * column[y]
            round_sums_to_bytes(sums, columns[size - 1 - x if flip else x])
        # Transpose, so that the vertical pass can add whole rows in the same way.
        for y in range(height):
            for x in range(size):
                rows[y, x] = columns[x, y]
        for y in range(size):
            sums[:size] = HALF
            for tap in range(count_y[y]):
                row = rows[first_y[y] + tap]
                weight = weight_y[y, tap]
                for x in range(size):
                    sums[x] += weight * row[x]
            round_sums_to_bytes(sums, out[channel, y])


@cached_njit
def round_sums_to_bytes(sums: np.ndarray, line: np.ndarray) -> None:
    """Drop the 22 fractional bits of the sums, which start at one half, and clip to 0 to 255."""
    for i in range(len(line)):
        line[i] = min(max(sums[i] >> BITS, 0), 255)


@cached_njit
def resample_weights(
    length: int, size: int, bilinear: bool
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return first source pixel, number of taps and weights (size, taps) of each output pixel.

    `precompute_coeffs` of Pillow's Resample.c: output pixel i is centered at (i + 0.5) * length /
    size and reaches 2 source pixels (bilinear: 1) to each side, or as many output pixels when the
    image shrinks.
    """
    scale = length / size
    stretch = max(scale, 1.0)
    support = (1.0 if bilinear else 2.0) * stretch
    taps = math.ceil(support) * 2 + 1
    first = np.empty(size, np.int64)
    count = np.empty(size, np.int64)
    fixed = np.empty((size, taps), np.int32)
    exact = np.empty(taps)
    for position in range(size):
        center = (position + 0.5) * scale
        low = max(int(center - support + 0.5), 0)
        high = min(int(center + support + 0.5), length)
        total = 0.0
        for tap in range(high - low):
            distance = (tap + low - center + 0.5) / stretch
            exact[tap] = max(1.0 - abs(distance), 0.0) if bilinear else keys_cubic_half(distance)
            total += exact[tap]
        # Normalized, as the kernel is cut off at the edges of the image; then rounded, halves away
        # from zero.
        for tap in range(high - low):
            value = exact[tap] / total * (1 << BITS)
            fixed[position, tap] = int(value - 0.5) if value < 0 else int(value + 0.5)
        first[position] = low
        count[position] = high - low
    return first, count, fixed


@cached_njit
def keys_cubic_half(x: float) -> float:
    """Return Keys' cubic convolution kernel with a = -0.5 (Keys 1981), which Pillow resizes with.

    (a + 2) |x|^3 - (a + 3) |x|^2 + 1 up to 1, a |x|^3 - 5a |x|^2 + 8a |x| - 4a up to 2, in Horner's
    form.
    """
    x = abs(x)
    if x < 1:
        return (1.5 * x - 2.5) * x * x + 1
    if x < 2:
        return -0.5 * (((x - 5) * x + 8) * x - 4)
    return 0.0
