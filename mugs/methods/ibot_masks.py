"""Masks of iBOT: which patches of a large crop the student does not see.

A mask is drawn as one integer with a bit for each patch, row by row from the lowest bit. Whole
rectangles are then joined and counted by single operations, without a loop over patches.
"""

from collections.abc import Sequence
from functools import lru_cache
from math import exp, log, sqrt
from typing import Literal, Protocol

import numpy as np
from numpy.random import Generator

MaskShape = Literal["block", "random"]

LOG_ASPECT = (log(0.3), log(1 / 0.3))
ATTEMPTS = 10


class Draws(Protocol):
    """The draws that masks are made of. Python's `random.Random` makes all but the last."""

    def uniform(self, low: float, high: float) -> float:
        """Return a draw from U(low, high)."""

    def randint(self, low: int, high: int) -> int:
        """Return an integer, both ends included."""

    def choice(self, options: Sequence[float]) -> float:
        """Return one of the options."""

    def shuffle(self, values: np.ndarray) -> None:
        """Bring the values into a random order, in place."""


class SampleDraws:
    """Draws from the generator of one sample."""

    def __init__(self, rng: Generator) -> None:
        self.random = rng.random
        self.shuffle = rng.shuffle

    def uniform(self, low: float, high: float) -> float:
        """Return a draw from U(low, high)."""
        return low + (high - low) * self.random()

    def randint(self, low: int, high: int) -> int:
        """Return an integer, both ends included."""
        # Not `Generator.integers`, which takes ten times as long for a single number.
        return low + int(self.random() * (high - low + 1))

    def choice(self, options: Sequence[float]) -> float:
        """Return one of the options."""
        return options[self.randint(0, len(options) - 1)]


def draw_ratio(draws: Draws, ratios: Sequence[float], half_widths: Sequence[float]) -> float:
    """Return one of the ratios at random, each first moved by up to its half-width."""
    moved = [
        draws.uniform(ratio - half, ratio + half) if half > 0 else ratio
        for ratio, half in zip(ratios, half_widths, strict=True)
    ]
    return draws.choice(moved) if len(moved) > 1 else moved[0]


def draw_mask(draws: Draws, side: int, ratio: float, shape: MaskShape) -> np.ndarray:
    """Return booleans (side, side), true where masked, at most `ratio` of them."""
    high = ratio * side**2
    if shape == "random":
        mask = np.zeros(side**2, dtype=bool)
        mask[len(mask) - int(high) :] = True
        draws.shuffle(mask)
        return mask.reshape(side, side)
    packed = draw_block_bits(draws, side, high).to_bytes(-(-(side**2) // 8), "little")
    bits = np.unpackbits(np.frombuffer(packed, np.uint8), count=side**2, bitorder="little")
    return bits.view(bool).reshape(side, side)


def draw_block_bits(draws: Draws, side: int, high: float) -> int:
    """Return a mask of rectangles with at most `high` patches, one bit per patch (as in BEiT).

    Drawing ends when ten rectangles in a row do not fit, so it often stops short of `high`.
    """
    least = float((side // 3) ** 2)
    mask = 0
    left = high
    failures = 0
    while left > 0 and failures < ATTEMPTS:
        new = draw_rectangle_bits(draws, side, least, left) & ~mask
        count = new.bit_count()
        if 0 < count <= left:
            mask |= new
            left -= count
            failures = 0
        else:
            failures += 1
    return mask


def draw_rectangle_bits(draws: Draws, side: int, least: float, most: float) -> int:
    """Return a rectangle of `least` to `most` patches; none if it is as long as the grid."""
    # With little left `most` is below `least`, as released; the area then lies between them.
    area = draws.uniform(least, most)
    aspect = exp(draws.uniform(*LOG_ASPECT))
    height = round(sqrt(area * aspect))
    width = round(sqrt(area / aspect))
    if height >= side or width >= side:
        return 0
    top = draws.randint(0, side - height)
    left = draws.randint(0, side - width)
    return make_rectangle(side, height, width) << (top * side + left)


@lru_cache(maxsize=4096)
def make_rectangle(side: int, height: int, width: int) -> int:
    """Return the rectangle at the top left."""
    return sum(((1 << width) - 1) << (side * row) for row in range(height))
