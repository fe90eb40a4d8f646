"""Batches of views: bytes as the loaders make them, floats as the networks get them."""

from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True)
class Batch:
    """Views of N images of one rank, crop by crop, as uint8.

    large (4, N, 3, S, S) holds teacher 0, teacher 1, student 0 and student 1; small is (P, N, 3, s,
    s). erase (4 + P, N, 4) holds boxes x, y, width, height, with width 0 for none. weak (N,) tells
    whether the large student crops are weak. ids and labels are (N,).
    """

    large: Tensor
    small: Tensor
    erase: Tensor
    weak: Tensor
    ids: Tensor
    labels: Tensor
    epoch: int
    step: int


@dataclass(frozen=True)
class Views:
    """Normalized crops of N images on the device, crop by crop.

    large (4, N, 3, S, S) holds teacher 0, teacher 1, student 0 and student 1; small is (P, N, 3, s,
    s). weak (N,) tells whether the large student crops are weak.
    """

    large: Tensor
    small: Tensor
    weak: Tensor
