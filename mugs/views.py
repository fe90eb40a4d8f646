"""Views of a batch as the networks get them."""

from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True)
class Views:
    """Crops of N images, crop-major; large ones are teacher 0, teacher 1, student 0, student 1.

    large (4, N, 3, S, S) and small (P, N, 3, s, s), normalised floats; weak (N,): the student's large crops were
    drawn weakly.
    """

    large: Tensor
    small: Tensor
    weak: Tensor
