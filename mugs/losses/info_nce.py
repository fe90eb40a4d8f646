"""InfoNCE with a queue, all crop pairs in one product (paper, equation of the instance and local-group losses).

T teacher crops, P student crops, N images, D width, K queue length.
"""

import torch
from torch import Tensor

from mugs.losses.blocked import QueueLogSumExp, without_autocast


def info_nce_loss(
    student_PND: Tensor,
    teacher_TND: Tensor,
    queue_KD: Tensor,
    weights_TP: Tensor,
    temperature: float,
) -> Tensor:
    """Weighted mean over pairs of the cross-entropy of the positive against itself and the queue.

    The queue logits do not depend on the teacher crop, so they are computed once per student crop and joined with
    the positive by logaddexp. Teacher and queue carry no gradient.
    """
    with without_autocast(student_PND):
        student_PND, teacher_TND = student_PND.float(), teacher_TND.float().detach()
        negative_R: Tensor = QueueLogSumExp.apply(student_PND.flatten(0, 1), queue_KD, temperature)
        negative_PN = negative_R.view(student_PND.shape[:2])
        positive_TPN = torch.einsum("tnd,pnd->tpn", teacher_TND, student_PND) / temperature
        loss_TPN = torch.logaddexp(positive_TPN, negative_PN[None]) - positive_TPN
    return (loss_TPN.mean(dim=-1) * weights_TP).sum()
