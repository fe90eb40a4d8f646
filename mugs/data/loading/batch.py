"""Batches of views: bytes as the loaders make them, floats as the networks get them."""

from collections.abc import Mapping
from dataclasses import dataclass

from torch import Tensor

from mugs.data.views.render.erase import BoxNoise


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
