"""Which (teacher crop, student crop) pairs count, and with which weight.

T teacher crops, P student crops of which the first `num_large` are large.
"""

import torch
from torch import Tensor

from mugs.losses.config import PairAverage


def pair_weights(
    num_teacher: int,
    num_student: int,
    num_large: int,
    average: PairAverage,
    device: torch.device | None = None,
) -> Tensor:
    """Weights (T, P) that sum to one; pairs of equal index are left out.

    "released": half of the weight for the pairs with a large student crop, half for those with a small one, all of
    it for the large ones when there are no small crops (the release divides by zero there). "uniform": every pair
    alike (paper, appendix B.1.2).
    """
    used = ~torch.eye(num_teacher, num_student, dtype=torch.bool)
    large = used & (torch.arange(num_student) < num_large)[None]
    small = used & ~large
    if average == "uniform" or num_student == num_large:
        weights = used / used.sum()
    else:
        weights = 0.5 * large / large.sum() + 0.5 * small / small.sum()
    return weights.to(device)
