"""Hue rotation through Pillow's 8-bit HSV, its roundings included; written without branches, so that it vectorises."""

import numpy as np

from mugs.data.render.compiled import compiled


@compiled
def rotate_hue(image: np.ndarray, shift: int) -> None:
    """Add to the hue of planes (3, ., .), in place; 256 steps are a full turn."""
    red, green, blue = image[0].reshape(-1), image[1].reshape(-1), image[2].reshape(-1)
    for i in range(len(red)):
        r, g, b = np.int32(red[i]), np.int32(green[i]), np.int32(blue[i])
        high, low = max(r, max(g, b)), min(r, min(g, b))
        hue = np.int32(hue_byte(r, g, b, high, low) + np.int32(shift)) & np.int32(255)
        share = saturation_share(high, low)
        wide = np.float64(high)
        angle = np.float64(np.int32(hue)) * 6.0 / 255.0
        sector = np.floor(angle)
        rest = np.float64(np.float32(angle - sector))
        p = to_byte(wide * (1.0 - share))
        q = to_byte(wide * (1.0 - share * rest))
        t = to_byte(wide * (1.0 - share * (1.0 - rest)))
        v = high
        red[i] = v if (sector < 1) | (sector > 4) else (q if sector < 2 else (p if sector < 4 else t))
        green[i] = t if (sector < 1) | (sector > 5) else (v if sector < 3 else (q if sector < 4 else p))
        blue[i] = p if (sector < 2) | (sector > 5) else (t if sector < 3 else (v if sector < 5 else q))


@compiled
def hue_byte(r: int, g: int, b: int, high: int, low: int) -> np.int32:
    """0 ... 255 for a full turn from red over green and blue; 0 for greys."""
    spread = np.float32(max(high - low, 1))
    red, green = np.float32(high - r) / spread, np.float32(high - g) / spread
    blue = np.float32(high - b) / spread
    from_red = np.float32(blue - green)
    from_green = np.float32(2.0 + np.float64(red) - np.float64(blue))
    from_blue = np.float32(4.0 + np.float64(green) - np.float64(red))
    angle = from_red if r == high else (from_green if g == high else from_blue)
    turn = np.float64(angle) / 6.0 + 1.0
    turn = turn - 1.0 if turn >= 1.0 else turn
    return np.int32(np.float64(np.float32(turn)) * 255.0)


@compiled
def saturation_share(high: int, low: int) -> float:
    """Saturation, by way of its byte, as a share."""
    byte = np.int32(np.float64(np.float32(high - low) / np.float32(max(high, 1))) * 255.0)
    return np.float64(np.float32(byte / 255.0))


@compiled
def to_byte(value: float) -> np.int32:
    """Rounded, halves up, after a rounding to single precision."""
    return np.int32(np.float64(np.float32(value)) + 0.5)
