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


@compiled
def rotate_hue(image: np.ndarray, shift: int) -> None:
    """Add to the hue, 256 steps being a full turn; through Pillow's 8-bit HSV."""
    red, green, blue = image[0].reshape(-1), image[1].reshape(-1), image[2].reshape(-1)
    for i in range(len(red)):
        r, g, b = np.int32(red[i]), np.int32(green[i]), np.int32(blue[i])
        high, low = max(r, max(g, b)), min(r, min(g, b))
        if high == low:
            continue
        hue, saturation = hue_and_saturation(r, g, b, high, low)
        red[i], green[i], blue[i] = from_hsv((hue + shift) & 255, saturation, high)


@compiled
def hue_and_saturation(r: int, g: int, b: int, high: int, low: int) -> tuple[int, int]:
    """Pillow's bytes of hue and saturation of a colour that is not grey."""
    spread = np.float32(high - low)
    saturation = spread / np.float32(high)
    red, green, blue = np.float32(high - r) / spread, np.float32(high - g) / spread, np.float32(high - b) / spread
    if r == high:
        hue = np.float32(blue - green)
    elif g == high:
        hue = np.float32(2.0 + np.float64(red) - np.float64(blue))
    else:
        hue = np.float32(4.0 + np.float64(green) - np.float64(red))
    turn = np.float64(hue) / 6.0 + 1.0
    hue = np.float32(turn - 1.0 if turn >= 1.0 else turn)
    return int(np.float64(hue) * 255.0), int(np.float64(saturation) * 255.0)


@compiled
def from_hsv(hue: int, saturation: int, value: int) -> tuple[int, int, int]:
    """Bytes of hue, saturation and value -> red, green, blue."""
    if saturation == 0:
        return value, value, value
    share = np.float64(np.float32(saturation / 255.0))
    sector = int(hue * 6.0 / 255.0)
    rest = np.float64(np.float32(hue * 6.0 / 255.0 - sector))
    p = int(np.float32(value * (1.0 - share)) + 0.5)
    q = int(np.float32(value * (1.0 - share * rest)) + 0.5)
    t = int(np.float32(value * (1.0 - share * (1.0 - rest))) + 0.5)
    sector %= 6
    if sector == 0:
        return value, t, p
    if sector == 1:
        return q, value, p
    if sector == 2:
        return p, value, t
    if sector == 3:
        return p, q, value
    if sector == 4:
        return t, p, value
    return value, p, q


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
