"""Batches of views: bytes as the loaders make them, floats as the networks get them."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from mugs.data.views.boxes import BoxDraws
from mugs.hashed_draws import box_muller


class BoxNoise(NamedTuple):
    """Noise of erased boxes: values (E,) float32, and their places (E,) int64.

    Places count the values of the large crops and then those of the small ones, as they are stored.
    """

    values: Tensor
    places: Tensor


NO_NOISE = BoxNoise(torch.empty(0), torch.empty(0, dtype=torch.int64))


def make_box_noise(parts: Sequence[BoxDraws]) -> BoxNoise:
    """Return the noise of several images, in page-locked memory where there is a GPU."""
    # Logarithm and cosine are torch's: those of numba differ in the last bit.
    uniforms = torch.from_numpy(np.concatenate([part.uniforms for part in parts], axis=1))
    places = torch.from_numpy(np.concatenate([part.places for part in parts]))
    values = box_muller(*uniforms)
    if torch.cuda.is_available():
        return BoxNoise(values.pin_memory(), places.pin_memory())
    return BoxNoise(values, places)


@dataclass(frozen=True)
class Batch:
    """Views of N images of one rank, crop by crop, as uint8.

    large (L, N, 3, S, S) holds the large crops: those of the teacher come first and those of the
    student last, so 2 are seen by both networks, and 4 are two for each. small is (P, N, 3, s, s).
    noise is what fills the boxes that are erased. extras are what the method's `annotate` made of
    each image, (N, ...) by name. ids and labels are (N,).
    """

    large: Tensor
    small: Tensor
    noise: BoxNoise
    extras: Mapping[str, Tensor]
    ids: Tensor
    labels: Tensor
    epoch: int
    step: int


@dataclass(frozen=True)
class Views:
    """Normalized crops of N images on the device, crop by crop.

    large (L, N, 3, S, S) holds the large crops: the teacher's are large[:2], the student's
    large[-2:]. small is (P, N, 3, s, s). extras are what the method's `annotate` made of each
    image, (N, ...) by name.
    """

    large: Tensor
    small: Tensor
    extras: Mapping[str, Tensor]
