"""What is known of erased boxes before their noise is drawn; free of numba, as the trainer is."""

from typing import NamedTuple

import numpy as np

from mugs.data.views.plan import Box


class ErasedBox(NamedTuple):
    """A box of a crop: the crop's number in random streams, and where its pixels are stored.

    The crop is three planes of `size` x `size` values that begin at `start` in the batch.
    """

    number: int
    box: Box
    start: int
    size: int


class BoxDraws(NamedTuple):
    """Draws (2, E) float32 from U(0, 1), two for each value of noise, and its place (E,) int64.

    Places count the values of the large crops of a batch and then those of the small ones, as they
    are stored.
    """

    uniforms: np.ndarray
    places: np.ndarray
