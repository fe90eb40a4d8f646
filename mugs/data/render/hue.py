"""Hue rotation through Pillow's 8-bit HSV, by tables."""

from functools import cache

import numpy as np

from mugs.data.render.compiled import compiled

# Order of the channels by (red >= green) + 2 (green >= blue) + 4 (red >= blue), as a row of the hue table.
ORDER = np.array([4, 5, 3, 0, 0, 1, 2, 0], np.uint8)
# Which of (highest, middle) red, green and blue are in each sixth of the colour wheel; else the lowest.
HIGHEST = np.array([[1, 0, 0, 0, 0, 1], [0, 1, 1, 0, 0, 0], [0, 0, 0, 1, 1, 0]], np.uint8)
MIDDLE = np.array([[0, 1, 0, 0, 1, 0], [1, 0, 0, 1, 0, 0], [0, 0, 1, 0, 0, 1]], np.uint8)


def rotate_hue(image: np.ndarray, shift: int) -> None:
    """Add to the hue of planes (3, ., .), in place; 256 steps are a full turn."""
    hues, saturations, lowest, rest, places = tables()
    replace_hue(image, hues + np.uint8(shift), saturations, lowest, rest, places)


@cache
def tables() -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """What Pillow makes of a colour's bytes, rounding included.

    hues (6, 256, 256): by order of channels, highest minus middle level, and spread (highest minus lowest).
    saturations (256, 256): by spread and highest level. lowest (256, 256): a colour's lowest level by saturation and
    value. rest (256,): by hue, the share of the saturation that the middle level goes without. places (256, 6): by hue,
    whether red, green, blue are the highest, then whether they are the middle level.
    """
    level = np.arange(256)
    with np.errstate(divide="ignore", invalid="ignore"):
        ratio = np.nan_to_num(level[:, None].astype(np.float32) / level.astype(np.float32), posinf=0)
    wide, one = ratio.astype(np.float64), np.float32(1)
    angle = np.stack([one - ratio, ratio - one, 2.0 + wide - 1.0, 2.0 + 1.0 - wide, 4.0 + wide - 1.0, 4.0 + 1.0 - wide])
    turn = np.fmod(angle.astype(np.float32).astype(np.float64) / 6.0 + 1.0, 1.0)
    hues = (turn.astype(np.float32).astype(np.float64) * 255.0).astype(np.uint8)
    saturations = np.minimum(wide * 255.0, 255).astype(np.uint8)
    share = (level / 255.0).astype(np.float32).astype(np.float64)
    lowest = np.floor((level * (1.0 - share[:, None])).astype(np.float32).astype(np.float64) + 0.5).astype(np.uint8)
    sector = np.floor(level * 6.0 / 255.0).astype(np.int64)
    within = (level * 6.0 / 255.0 - sector).astype(np.float32).astype(np.float64)
    rest = np.where(sector % 2 == 1, within, 1.0 - within)
    places = np.concatenate([HIGHEST, MIDDLE])[:, sector % 6].T.copy()
    return hues, saturations, lowest, rest, places


@compiled
def replace_hue(
    image: np.ndarray,
    hues: np.ndarray,
    saturations: np.ndarray,
    lowest: np.ndarray,
    rest: np.ndarray,
    places: np.ndarray,
) -> None:
    """Colour by colour, without a branch: each channel is the lowest level plus its share of the way up."""
    red, green, blue = image[0].reshape(-1), image[1].reshape(-1), image[2].reshape(-1)
    for i in range(len(red)):
        r, g, b = np.uint32(red[i]), np.uint32(green[i]), np.uint32(blue[i])
        high, low = max(r, max(g, b)), min(r, min(g, b))
        spread = high - low
        order = ORDER[np.uint32(r >= g) + np.uint32(2) * np.uint32(g >= b) + np.uint32(4) * np.uint32(r >= b)]
        hue = hues[order, high - (r + g + b - high - low), spread]
        saturation = saturations[spread, high]
        base = np.uint32(lowest[saturation, high])
        share = np.float64(np.float32(saturation / 255.0))
        middle = np.uint32(np.float64(np.float32(high * (1.0 - share * rest[hue]))) + 0.5) - base
        top, place = high - base, places[hue]
        red[i] = base + place[0] * top + place[3] * middle
        green[i] = base + place[1] * top + place[4] * middle
        blue[i] = base + place[2] * top + place[5] * middle
