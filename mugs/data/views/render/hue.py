"""Hue rotation through Pillow's 8-bit HSV, its roundings included; written without branches, so that it vectorises.

Pillow mixes single and double precision. Single precision alone gives the same bytes for every colour, with twice as
many pixels in a register.
"""

import numpy as np

from mugs.data.views.render.compiled import cached_njit

ONE = np.float32(1)


@cached_njit
def rotate_hue(image: np.ndarray, shift: int) -> None:
    """Add to the hue of planes (3, ., .), in place; 256 steps are a full turn."""
    red, green, blue = image[0].reshape(-1), image[1].reshape(-1), image[2].reshape(-1)
    for i in range(len(red)):
        r, g, b = np.int32(red[i]), np.int32(green[i]), np.int32(blue[i])
        high, low = max(r, max(g, b)), min(r, min(g, b))
        hue = np.int32(hue_byte(r, g, b, high, low) + np.int32(shift)) & np.int32(255)
        share, wide = saturation_share(high, low), np.float32(high)
        sixths = np.float32(6) * np.float32(hue)
        sector = np.floor(sixths / np.float32(255))
        rest = (sixths - np.float32(255) * sector) / np.float32(255)
        p = round_to_byte(wide * (ONE - share))
        q = round_to_byte(wide * (ONE - share * rest))
        t = round_to_byte(wide * (ONE - share * (ONE - rest)))
        v = high
        red[i] = (
            v if (sector < 1) | (sector > 4) else (q if sector < 2 else (p if sector < 4 else t))
        )
        green[i] = (
            t if (sector < 1) | (sector > 5) else (v if sector < 3 else (q if sector < 4 else p))
        )
        blue[i] = (
            p if (sector < 2) | (sector > 5) else (t if sector < 3 else (v if sector < 5 else q))
        )


@cached_njit
def hue_byte(r: int, g: int, b: int, high: int, low: int) -> np.int32:
    """0 ... 255 for a full turn from red over green and blue; 0 for greys.

    Where green is highest, the angle is 2 + red - blue, and red or blue is 1: one rounding either way. So for blue.
    """
    spread = np.float32(max(high - low, 1))
    red, green, blue = (
        np.float32(high - r) / spread,
        np.float32(high - g) / spread,
        np.float32(high - b) / spread,
    )
    from_red = blue - green
    from_green = np.float32(3) - blue if r == low else ONE + red
    from_blue = np.float32(3) + green if r == low else np.float32(5) - red
    turn = (from_red if r == high else (from_green if g == high else from_blue)) / np.float32(6)
    return np.int32((turn + ONE if turn < 0 else turn) * np.float32(255))


@cached_njit
def saturation_share(high: int, low: int) -> np.float32:
    """Saturation, by way of its byte, as a share."""
    byte = np.int32(np.float32(high - low) / np.float32(max(high, 1)) * np.float32(255))
    return np.float32(byte) / np.float32(255)


@cached_njit
def round_to_byte(value: np.float32) -> np.int32:
    """Rounded, halves up."""
    return np.int32(value + np.float32(0.5))
