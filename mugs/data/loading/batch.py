"""Batches of views: as the loaders make them, and as the networks get them."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

from torch import Tensor

if TYPE_CHECKING:
    pass


@dataclass(frozen=True)
class Batch:
    """Views of N images of one rank, crop-major, as bytes.

    large (4, N, 3, S, S): teacher 0, teacher 1, student 0, student 1; small (P, N, 3, s, s); erase (4 + P, N, 4) boxes
    x, y, w, h with w = 0 for none; weak (N,): the large student crops are weak; ids and labels (N,).
    """

    large: Tensor
    small: Tensor
    erase: Tensor
    weak: Tensor
    ids: Tensor
    labels: Tensor
    epoch: int
    step: int


class ViewLoader(Protocol):
    """A front end: any of them gives the same batches."""

    def iterate(self, start: int, stop: int) -> Iterator[Batch]:
        """This rank's batches of global steps start ... stop - 1."""

    def close(self) -> None:
        """Stop all threads."""


@dataclass(frozen=True)
class Views:
    """Crops of N images, crop-major; large ones are teacher 0, teacher 1, student 0, student 1.

    large (4, N, 3, S, S) and small (P, N, 3, s, s), normalised floats; weak (N,): the student's large crops were
    drawn weakly.
    """

    large: Tensor
    small: Tensor
    weak: Tensor
