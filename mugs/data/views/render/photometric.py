"""Color operations on planes (3, ., .) uint8, in place and equal to Pillow's.

The order of the last two axes does not matter, so transposed planes are fine too.
"""

import numpy as np

from mugs.data.views.render.compiled import cached_njit

LEVELS = np.arange(256)


def blend_table(degenerate: int, factor: float) -> np.ndarray:
    """Return the levels (256,) of an image blended with one of a single level.

    The level is 0 for brightness and the mean gray for contrast. A factor above 1 extrapolates.
    """
    alpha = np.float32(factor)
    value = np.float32(degenerate) + alpha * (LEVELS - degenerate).astype(np.float32)
    return np.asarray(np.clip(value, 0, 255), np.uint8)


@cached_njit
def apply_table(image: np.ndarray, table: np.ndarray) -> None:
    """Replace the levels of each channel by those of its row of the table (3, 256)."""
    for channel in range(3):
        levels = table[channel]
        pixels = image[channel].reshape(-1)
        for i in range(len(pixels)):
            pixels[i] = levels[pixels[i]]


@cached_njit
def rgb_to_luma(red: int, green: int, blue: int) -> int:
    """Return the gray level of a color, in Pillow's 16-bit fixed-point arithmetic."""
    # ITU-R BT.601: 0.299, 0.587 and 0.114 times 2 ** 16; 0x8000 rounds to the nearest level.
    return (red * 19595 + green * 38470 + blue * 7471 + 0x8000) >> 16


@cached_njit
def mean_luma(image: np.ndarray) -> int:
    """Return the mean gray level, rounded, as `ImageEnhance.Contrast` uses it."""
    red = image[0].reshape(-1)
    green = image[1].reshape(-1)
    blue = image[2].reshape(-1)
    # The sum is an exact integer; only the mean is rounded, halves up.
    total = 0
    for i in range(len(red)):
        total += rgb_to_luma(np.int32(red[i]), np.int32(green[i]), np.int32(blue[i]))
    return int(total / len(red) + 0.5)


@cached_njit
def blend_with_level(image: np.ndarray, degenerate: int, factor: float) -> None:
    """Blend with an image of a single level, as `blend_table` without a table."""
    # This arithmetic vectorizes; looking up a table does not.
    pixels = image.reshape(-1)
    base = np.float32(degenerate)
    alpha = np.float32(factor)
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
    """Blend with the gray image: factor 0 gives gray, 1 the image itself."""
    red = image[0].reshape(-1)
    green = image[1].reshape(-1)
    blue = image[2].reshape(-1)
    alpha = np.float32(factor)
    for i in range(len(red)):
        luma = rgb_to_luma(np.int32(red[i]), np.int32(green[i]), np.int32(blue[i]))
        # Through int32: numba computes the luma in 64 bits, which fill twice as many registers.
        base = np.float32(np.int32(luma))
        red[i] = truncate_to_byte(base + alpha * (np.float32(red[i]) - base))
        green[i] = truncate_to_byte(base + alpha * (np.float32(green[i]) - base))
        blue[i] = truncate_to_byte(base + alpha * (np.float32(blue[i]) - base))


@cached_njit
def truncate_to_byte(value: np.float32) -> np.uint8:
    """Clip to 0 to 255 and drop the fraction, as Pillow's `Image.blend` does."""
    return np.uint8(min(max(value, np.float32(0)), np.float32(255)))


@cached_njit
def convert_to_gray(image: np.ndarray) -> None:
    """Set every channel to the gray level."""
    red = image[0].reshape(-1)
    green = image[1].reshape(-1)
    blue = image[2].reshape(-1)
    for i in range(len(red)):
        level = np.uint8(rgb_to_luma(np.int32(red[i]), np.int32(green[i]), np.int32(blue[i])))
        red[i] = level
        green[i] = level
        blue[i] = level
