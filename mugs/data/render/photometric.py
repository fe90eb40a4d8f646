"""Colour operations on planes (3, ., .) uint8 in place, equal to Pillow's; the order of the last two axes is free."""

import math

import numpy as np

from mugs.data.render.compiled import compiled

LEVELS = np.arange(256)


def blend_table(degenerate: int, factor: float) -> np.ndarray:
    """Levels (256,) of an image blended with a constant one: brightness (0) and contrast (mean grey)."""
    alpha = np.float32(factor)
    value = np.float32(degenerate) + alpha * (LEVELS - degenerate).astype(np.float32)
    table: np.ndarray = np.clip(value, 0, 255).astype(np.uint8)
    return table


def solarize_table(threshold: int) -> np.ndarray:
    """Levels (256,), inverted from the threshold on."""
    return np.where(threshold <= LEVELS, 255 - LEVELS, LEVELS).astype(np.uint8)


@compiled
def apply_table(image: np.ndarray, table: np.ndarray) -> None:
    """Replace levels; table (3, 256)."""
    for channel in range(3):
        levels, pixels = table[channel], image[channel].reshape(-1)
        for i in range(len(pixels)):
            pixels[i] = levels[pixels[i]]


@compiled
def luma(red: int, green: int, blue: int) -> int:
    """Grey level of a colour (ITU-R 601-2)."""
    return (red * 19595 + green * 38470 + blue * 7471 + 0x8000) >> 16


@compiled
def mean_luma(image: np.ndarray, table: np.ndarray) -> int:
    """Rounded mean grey level of an image whose levels are replaced by a table (3, 256)."""
    red, green, blue = image[0].reshape(-1), image[1].reshape(-1), image[2].reshape(-1)
    total = 0
    for i in range(len(red)):
        total += luma(np.int32(table[0, red[i]]), np.int32(table[1, green[i]]), np.int32(table[2, blue[i]]))
    return int(total / len(red) + 0.5)


@compiled
def color(image: np.ndarray, factor: float) -> None:
    """Blend with the grey image: 0 is grey, 1 the image itself."""
    red, green, blue = image[0].reshape(-1), image[1].reshape(-1), image[2].reshape(-1)
    alpha = np.float32(factor)
    for i in range(len(red)):
        grey = luma(np.int32(red[i]), np.int32(green[i]), np.int32(blue[i]))
        base = np.float32(grey)
        red[i] = np.uint8(min(max(base + alpha * np.float32(red[i] - grey), np.float32(0)), np.float32(255)))
        green[i] = np.uint8(min(max(base + alpha * np.float32(green[i] - grey), np.float32(0)), np.float32(255)))
        blue[i] = np.uint8(min(max(base + alpha * np.float32(blue[i] - grey), np.float32(0)), np.float32(255)))


@compiled
def grey(image: np.ndarray) -> None:
    """Every channel becomes the grey level."""
    red, green, blue = image[0].reshape(-1), image[1].reshape(-1), image[2].reshape(-1)
    for i in range(len(red)):
        level = np.uint8(luma(np.int32(red[i]), np.int32(green[i]), np.int32(blue[i])))
        red[i], green[i], blue[i] = level, level, level


def box_radius(radius: float) -> float:
    """Radius of the box whose threefold application stands for a Gaussian (Gwosdek et al. 2011)."""
    variance = np.float32(radius) * np.float32(radius) / np.float32(3)
    length = np.float32(math.sqrt(12.0 * variance + 1.0))
    whole = np.float32(math.floor((length - 1.0) / 2.0))
    part = (2 * whole + 1) * (whole * (whole + 1) - 3 * variance)
    part /= 6 * (variance - (whole + 1) * (whole + 1))
    return float(np.float32(whole + part))


def blur(image: np.ndarray, radius: float) -> None:
    """Pillow's GaussianBlur of planes (3, S, S): three boxes along each axis."""
    box = np.float32(box_radius(radius))
    weight = int(np.float32(1 << 24) / (box * np.float32(2) + np.float32(1)))
    blur_boxes(image, int(box), weight, ((1 << 24) - (int(box) * 2 + 1) * weight) // 2)


@compiled
def blur_boxes(image: np.ndarray, radius: int, weight: int, edge: int) -> None:
    """Three box passes along the last axis, then three along the one before, each rounded to bytes."""
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
