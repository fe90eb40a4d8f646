"""InfoNCE with a queue of negatives, for the instance and the local-group level (paper, section 3).

For a student crop s and a teacher crop y, both of unit length, the loss is the cross-entropy of the
positive logit s . y / temperature against the logits s . q_k / temperature of the queue.

Shapes: T teacher crops, P student crops, N images, R = P * N, D width, K queue length.
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
    """Return the weighted mean over pairs of -log of the positive's share of all exponentials.

    All pairs are computed together: the queue logits do not depend on the teacher crop, so they are
    computed once per student crop and joined with each positive by logaddexp.
    """
    with without_autocast(student_PND):
        student_PND = student_PND.float()
        teacher_TND = teacher_TND.float().detach()  # stop-gradient; the queue has none either
        negative_R: Tensor = QueueLogSumExp.apply(student_PND.flatten(0, 1), queue_KD, temperature)
        negative_PN = negative_R.view(student_PND.shape[:2])
        positive_TPN = torch.einsum("tnd,pnd->tpn", teacher_TND, student_PND) / temperature

        # -log(e^+ / (e^+ + sum e^-)) = log(e^+ + sum e^-) - log e^+
        loss_TPN = torch.logaddexp(positive_TPN, negative_PN[None]) - positive_TPN
    return (loss_TPN.mean(dim=-1) * weights_TP).sum()
