"""Pillow's Gaussian blur: three box blurs along each axis, rounded to bytes in between."""

import math

import numpy as np

from mugs.data.views.render.compiled import cached_njit


def box_weights(radius: float) -> tuple[int, int, int]:
    """Whole radius of the boxes, weight of the pixels within it and of the two beyond; weights sum to 2 ** 24."""
    box = np.float32(box_radius(radius))
    weight = int(np.float32(1 << 24) / (box * np.float32(2) + np.float32(1)))
    return int(box), weight, ((1 << 24) - (int(box) * 2 + 1) * weight) // 2


def box_radius(radius: float) -> float:
    """Radius of the box whose threefold application stands for a Gaussian (Gwosdek et al. 2011)."""
    variance = np.float32(radius) * np.float32(radius) / np.float32(3)
    length = np.float32(math.sqrt(12.0 * variance + 1.0))
    whole = np.float32(math.floor((length - 1.0) / 2.0))
    part = (2 * whole + 1) * (whole * (whole + 1) - 3 * variance)
    part /= 6 * (variance - (whole + 1) * (whole + 1))
    return float(np.float32(whole + part))


@cached_njit
def gaussian_blur(image: np.ndarray, radius: int, weight: int, edge: int) -> None:
    """Planes (3, S, S) in place: three passes along the last axis, then three along the one before."""
    size = image.shape[1]
    sums, buffer = np.empty(size, np.uint32), np.empty((size, size), np.uint8)
    for channel in range(3):
        plane = image[channel]
        for _ in range(2):
            turned = np.ascontiguousarray(plane.T)
            box_blur_rows(turned, buffer, sums, radius, weight, edge)
            box_blur_rows(buffer, turned, sums, radius, weight, edge)
            box_blur_rows(turned, plane, sums, radius, weight, edge)


@cached_njit
def box_blur_rows(
    rows: np.ndarray, out: np.ndarray, sums: np.ndarray, radius: int, weight: int, edge: int
) -> None:
    """Mean of 2 radius + 1 rows around each and, with less weight, of the two beyond; edges repeat."""
    last, width = rows.shape[0] - 1, rows.shape[1]
    inner, outer, half = np.uint32(weight), np.uint32(edge), np.uint32(1 << 23)
    for y in range(last + 1):
        row = rows[y]
        for x in range(width):
            sums[x] = row[x]
        for distance in range(1, radius + 1):
            above, below = rows[max(y - distance, 0)], rows[min(y + distance, last)]
            for x in range(width):
                sums[x] += np.uint32(above[x]) + np.uint32(below[x])
        before, after, line = rows[max(y - radius - 1, 0)], rows[min(y + radius + 1, last)], out[y]
        for x in range(width):
            beyond = np.uint32(np.uint32(before[x]) + np.uint32(after[x]))
            total = np.uint32(np.uint32(sums[x] * inner) + np.uint32(beyond * outer))
            line[x] = np.uint32(total + half) >> np.uint32(24)
