"""Hue rotation through Pillow's 8-bit HSV, its roundings included.

Pillow mixes single and double precision. Single precision alone gives the same bytes for every
color and fits twice as many pixels into a register; a slow test compares all 16.7 million colors.
The kernels choose by conditional expressions instead of branches, so that the compiler can
vectorize them.
"""

import numpy as np

from mugs.data.views.render.compiled import cached_njit

ONE = np.float32(1)


@cached_njit
def rotate_hue(image: np.ndarray, shift: int) -> None:
    """Add `shift` to the hue of planes (3, ., .), in place; 256 steps are a full turn.

    HSV to RGB with p = v (1 - s), q = v (1 - s f), t = v (1 - s (1 - f)), where f is the fraction
    of the hue within its sector of 60 degrees.
    """
    red = image[0].reshape(-1)
    green = image[1].reshape(-1)
    blue = image[2].reshape(-1)
    for i in range(len(red)):
        r = np.int32(red[i])
        g = np.int32(green[i])
        b = np.int32(blue[i])
        high = max(r, max(g, b))
        low = min(r, min(g, b))
        # The mask is modulo 256: hues wrap around.
        hue = np.int32(hue_byte(r, g, b, high, low) + np.int32(shift)) & np.int32(255)
        saturation = saturation_share(high, low)
        value = np.float32(high)
        sixths = np.float32(6) * np.float32(hue)
        sector = np.floor(sixths / np.float32(255))
        fraction = (sixths - np.float32(255) * sector) / np.float32(255)
        p = round_to_byte(value * (ONE - saturation))
        q = round_to_byte(value * (ONE - saturation * fraction))
        t = round_to_byte(value * (ONE - saturation * (ONE - fraction)))
        v = high
        # Sectors 0 to 5 are (v, t, p), (q, v, p), (p, v, t), (p, q, v), (t, p, v) and (v, p, q).
        # Hue 255 is sector 6, which equals sector 0.
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
    """Return the hue: 0 to 255 for a full turn from red over green and blue, 0 for grays.

    With red, green and blue the distances from the highest channel, divided by the spread, the
    angle in sixths of a turn is blue - green, 2 + red - blue or 4 + green - red, by which channel
    is highest. Pillow
    adds in double precision. Here the distance of the lowest channel, which is 1, is put in
    beforehand:
    one sum is left, and float32 rounds it to the same value.
    """
    spread = np.float32(max(high - low, 1))
    red = np.float32(high - r) / spread
    green = np.float32(high - g) / spread
    blue = np.float32(high - b) / spread
    from_red = blue - green
    from_green = np.float32(3) - blue if r == low else ONE + red
    from_blue = np.float32(3) + green if r == low else np.float32(5) - red
    turn = (from_red if r == high else (from_green if g == high else from_blue)) / np.float32(6)
    return np.int32((turn + ONE if turn < 0 else turn) * np.float32(255))


@cached_njit
def saturation_share(high: int, low: int) -> np.float32:
    """Return the saturation as a share, rounded to a byte in between as Pillow stores it."""
    byte = np.int32(np.float32(high - low) / np.float32(max(high, 1)) * np.float32(255))
    return np.float32(byte) / np.float32(255)


@cached_njit
def round_to_byte(value: np.float32) -> np.int32:
    """Round to the nearest integer, halves up; the value lies in 0 to 255."""
    return np.int32(value + np.float32(0.5))
