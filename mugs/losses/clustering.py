"""Group discrimination: clustering on prototypes with a centred, sharpened teacher.

T teacher crops, P student crops, N images, K prototypes.
"""

import torch
from torch import Tensor


def clustering(
    student_PNK: Tensor,
    teacher_TNK: Tensor,
    center_K: Tensor,
    weights_TP: Tensor,
    *,
    student_temperature: float,
    teacher_temperature: float,
) -> Tensor:
    """Weighted mean over pairs of the cross-entropy between the teacher's and the student's assignments.

    The assignments q sum to one, so -sum q log p = logsumexp(z) - q . z with z the scaled student logits: one batched
    product for all pairs and no (T, P, N, K) tensor.
    """
    scaled_PNK = student_PNK.float() / student_temperature
    assigned_TNK = torch.softmax((teacher_TNK.float().detach() - center_K) / teacher_temperature, dim=-1)
    agreement_NTP = torch.bmm(assigned_TNK.transpose(0, 1), scaled_PNK.permute(1, 2, 0))
    loss_NTP = torch.logsumexp(scaled_PNK, dim=-1).T[:, None] - agreement_NTP
    return (loss_NTP.mean(dim=0) * weights_TP).sum()


def teacher_temperature_at(epoch: int, *, start: float, end: float, warmup_epochs: int) -> float:
    """Per-epoch teacher temperature, as released: linspace(start, end, n)[epoch], then `end`."""
    if epoch >= warmup_epochs:
        return end
    return start + (end - start) * epoch / max(warmup_epochs - 1, 1)
