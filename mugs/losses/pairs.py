"""Weights of the pairs of a teacher crop and a student crop.

Shapes: T teacher crops, P student crops of which the first `num_large` are large.
"""

from functools import lru_cache

import torch
from torch import Tensor

from mugs.devices import copy_to_device
from mugs.losses.config import PairAverage


def pair_weights(
    num_teacher: int,
    num_student: int,
    num_large: int,
    average: PairAverage,
    device: torch.device | None = None,
) -> Tensor:
    """Return weights (T, P) that sum to one; pairs of equal index are left out (M31).

    "released": pairs with a large student crop get half of the weight together, and pairs with a
    small one the other half. Without small crops the large ones get all of it: the release divides
    by zero there (M4). "uniform": all pairs have the same weight (paper, appendix B.1.2; M8).

    The tensor is shared between calls, so it must not be changed.
    """
    device = device or torch.device("cpu")
    return _make_weights(
        num_teacher, num_student, num_large, average, device, torch.get_default_dtype()
    )


# The same in every step, so they are made and copied once.
@lru_cache(maxsize=16)
def _make_weights(
    num_teacher: int,
    num_student: int,
    num_large: int,
    average: PairAverage,
    device: torch.device,
    dtype: torch.dtype,
) -> Tensor:
    # Teacher and student crops are independent draws, so equal indices could be compared as well;
    # the release leaves them out (M31).
    used = ~torch.eye(num_teacher, num_student, dtype=torch.bool)
    large = used & (torch.arange(num_student) < num_large)[None]
    small = used & ~large
    if average == "uniform" or num_student == num_large:
        weights = used / used.sum()
    else:
        weights = 0.5 * large / large.sum() + 0.5 * small / small.sum()
    return copy_to_device(weights.to(dtype), device)
