"""Pillow's Gaussian blur: three box blurs along each axis, rounded to bytes after each.

Every rounding is Pillow's, float32 where Pillow has float32, so that the bytes are equal.
"""

import math

import numpy as np

from mugs.data.views.render.compiled import cached_njit


def box_weights(radius: float) -> tuple[int, int, int]:
    """Return the whole radius of the boxes, the weight of pixels within it and of the two beyond.

    Weights are fixed-point numbers: those of one box sum to 2 ** 24.
    """
    box = np.float32(box_radius(radius))
    whole = int(box)
    weight = int(np.float32(1 << 24) / (box * np.float32(2) + np.float32(1)))
    # What the 2 * whole + 1 inner pixels leave of 2 ** 24 goes to the two pixels beyond, half each.
    return whole, weight, ((1 << 24) - (whole * 2 + 1) * weight) // 2


def box_radius(radius: float) -> float:
    """Return the fractional radius of the box that, applied three times, approximates a Gaussian.

    The extended box of Gwosdek et al. 2011, "Theoretical foundations of Gaussian convolution by
    extended box filtering": three boxes of variance radius ** 2 / 3 each have the variance of the
    Gaussian.
    """
    variance = np.float32(radius) * np.float32(radius) / np.float32(3)
    # A box of length L has the variance (L ** 2 - 1) / 12. `whole` is the radius of the largest odd
    # box that is not too wide, `part` what is missing on each side.
    length = np.float32(math.sqrt(12.0 * variance + 1.0))
    whole = np.float32(math.floor((length - 1.0) / 2.0))
    part = (2 * whole + 1) * (whole * (whole + 1) - 3 * variance)
    part /= 6 * (variance - (whole + 1) * (whole + 1))
    return float(np.float32(whole + part))


@cached_njit
def gaussian_blur(image: np.ndarray, radius: int, weight: int, edge: int) -> None:
    """Blur planes (3, S, S) in place: three passes along the last axis, three along the other.

    The arguments beside the image are those of `box_weights`.
    """
    size = image.shape[1]
    sums = np.empty(size, np.uint32)
    buffer = np.empty((size, size), np.uint8)
    for channel in range(3):
        plane = image[channel]
        # `box_blur_rows` adds whole rows, which vectorizes. Both axes are blurred by the same code:
        # each turn works on the transposed plane, and the second one transposes it back.
        for _ in range(2):
            turned = np.ascontiguousarray(plane.T)
            box_blur_rows(turned, buffer, sums, radius, weight, edge)
            box_blur_rows(buffer, turned, sums, radius, weight, edge)
            box_blur_rows(turned, plane, sums, radius, weight, edge)


@cached_njit
def box_blur_rows(
    rows: np.ndarray, out: np.ndarray, sums: np.ndarray, radius: int, weight: int, edge: int
) -> None:
    """Write the weighted mean of each row, `radius` rows around it and the two beyond these.

    out[y] = (weight * sum of the inner rows + edge * (row before + row after) + half) >> 24. Rows
    beyond the edge repeat the last one. `sums` is memory to work in.
    """
    last = rows.shape[0] - 1
    width = rows.shape[1]
    inner = np.uint32(weight)
    outer = np.uint32(edge)
    half = np.uint32(1 << 23)
    for y in range(last + 1):
        row = rows[y]
        for x in range(width):
            sums[x] = row[x]
        # The sums are made anew for each row: a running sum would save no additions here, as the
        # boxes of the recipe's blur (radius up to 2) have a whole radius of 0 or 1.
        for distance in range(1, radius + 1):
            above = rows[max(y - distance, 0)]
            below = rows[min(y + distance, last)]
            for x in range(width):
                sums[x] += np.uint32(above[x]) + np.uint32(below[x])
        before = rows[max(y - radius - 1, 0)]
        after = rows[min(y + radius + 1, last)]
        line = out[y]
        # The casts keep numba in 32 bits: it would widen the sum of two uint32 to 64 bits, and half
        # as many pixels would fit into a vector register.
        for x in range(width):
            beyond = np.uint32(np.uint32(before[x]) + np.uint32(after[x]))
            total = np.uint32(np.uint32(sums[x] * inner) + np.uint32(beyond * outer))
            line[x] = np.uint32(total + half) >> np.uint32(24)
