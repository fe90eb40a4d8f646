"""Colour operations on planes (3, ., .) uint8 in place, equal to Pillow's; the order of the last two axes is free."""

import numpy as np

from mugs.data.views.render.compiled import cached_njit

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


@cached_njit
def apply_table(image: np.ndarray, table: np.ndarray) -> None:
    """Replace levels; table (3, 256)."""
    for channel in range(3):
        levels, pixels = table[channel], image[channel].reshape(-1)
        for i in range(len(pixels)):
            pixels[i] = levels[pixels[i]]


@cached_njit
def rgb_to_luma(red: int, green: int, blue: int) -> int:
    """Grey level of a colour (ITU-R 601-2)."""
    return (red * 19595 + green * 38470 + blue * 7471 + 0x8000) >> 16


@cached_njit
def mean_luma(image: np.ndarray) -> int:
    """Rounded mean grey level."""
    red, green, blue = image[0].reshape(-1), image[1].reshape(-1), image[2].reshape(-1)
    total = 0
    for i in range(len(red)):
        total += rgb_to_luma(np.int32(red[i]), np.int32(green[i]), np.int32(blue[i]))
    return int(total / len(red) + 0.5)


@cached_njit
def blend_with_level(image: np.ndarray, degenerate: int, factor: float) -> None:
    """Blend with an image of one level: brightness (0) and contrast (mean grey)."""
    pixels, base, alpha = image.reshape(-1), np.float32(degenerate), np.float32(factor)
    for i in range(len(pixels)):
        pixels[i] = truncate_to_byte(base + alpha * (np.float32(pixels[i]) - base))


@cached_njit
def solarize_planes(image: np.ndarray) -> None:
    """Invert levels from 128 on."""
    pixels = image.reshape(-1)
    for i in range(len(pixels)):
        pixels[i] = 255 - pixels[i] if pixels[i] >= 128 else pixels[i]


@cached_njit
def adjust_saturation(image: np.ndarray, factor: float) -> None:
    """Blend with the grey image: 0 is grey, 1 the image itself."""
    red, green, blue = image[0].reshape(-1), image[1].reshape(-1), image[2].reshape(-1)
    alpha = np.float32(factor)
    for i in range(len(red)):
        base = np.float32(
            np.int32(rgb_to_luma(np.int32(red[i]), np.int32(green[i]), np.int32(blue[i])))
        )
        red[i] = truncate_to_byte(base + alpha * (np.float32(red[i]) - base))
        green[i] = truncate_to_byte(base + alpha * (np.float32(green[i]) - base))
        blue[i] = truncate_to_byte(base + alpha * (np.float32(blue[i]) - base))


@cached_njit
def truncate_to_byte(value: np.float32) -> np.uint8:
    """Cut to 0 ... 255, the fraction dropped."""
    return np.uint8(min(max(value, np.float32(0)), np.float32(255)))


@cached_njit
def convert_to_gray(image: np.ndarray) -> None:
    """Every channel becomes the grey level."""
    red, green, blue = image[0].reshape(-1), image[1].reshape(-1), image[2].reshape(-1)
    for i in range(len(red)):
        level = np.uint8(rgb_to_luma(np.int32(red[i]), np.int32(green[i]), np.int32(blue[i])))
        red[i], green[i], blue[i] = level, level, level
