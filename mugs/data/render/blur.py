"""Pillow's Gaussian blur: three box blurs along each axis, rounded to bytes in between."""

import math

import numpy as np

from mugs.data.render.compiled import compiled


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


@compiled
def blur(image: np.ndarray, radius: int, weight: int, edge: int) -> None:
    """Planes (3, S, S) in place: three passes along the last axis, then three along the one before."""
    for channel in range(3):
        plane = image[channel]
        turned = np.ascontiguousarray(plane.T)
        for _ in range(3):
            turned = box_pass(turned, radius, weight, edge)
        turned = np.ascontiguousarray(turned.T)
        for _ in range(3):
            turned = box_pass(turned, radius, weight, edge)
        plane[:] = turned


@compiled
def box_pass(rows: np.ndarray, radius: int, weight: int, edge: int) -> np.ndarray:
    """Mean of 2 radius + 1 rows around each, the two rows beyond counted by `edge`; all weights sum to 2 ** 24."""
    num, width = rows.shape
    out = np.empty_like(rows)
    sums = np.zeros(width, np.uint32)
    for offset in range(-radius, radius + 1):
        row = rows[min(max(offset, 0), num - 1)]
        for x in range(width):
            sums[x] += row[x]
    inner, outer = np.uint32(weight), np.uint32(edge)
    for y in range(num):
        before, after = rows[max(y - radius - 1, 0)], rows[min(y + radius + 1, num - 1)]
        leaving, line = rows[max(y - radius, 0)], out[y]
        for x in range(width):
            total = sums[x] * inner + (np.uint32(before[x]) + np.uint32(after[x])) * outer
            line[x] = np.uint32(total + np.uint32(1 << 23)) >> np.uint32(24)
            sums[x] += np.uint32(after[x]) - np.uint32(leaving[x])
    return out
