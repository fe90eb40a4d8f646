"""Group discrimination: clustering on prototypes with a centred, sharpened teacher.

T teacher crops, P student crops, N images, K prototypes.
"""

from torch import Tensor

from mugs.losses.blocked import ClusteringCrossEntropy, without_autocast


def clustering_loss(
    student_PNK: Tensor,
    teacher_TNK: Tensor,
    center_K: Tensor,
    weights_TP: Tensor,
    *,
    student_temperature: float,
    teacher_temperature: float,
) -> Tensor:
    """Weighted mean over pairs of the cross-entropy between the teacher's and the student's assignments.

    The assignments q sum to one, so -sum q log p = logsumexp(z) - q . z with z the scaled student logits, and the
    pairs of a student crop share the first term and take the mixture of the assignments in the second.
    """
    with without_autocast(student_PNK):
        loss: Tensor = ClusteringCrossEntropy.apply(
            student_PNK,
            teacher_TNK.detach(),
            center_K,
            weights_TP,
            student_temperature,
            teacher_temperature,
        )
    return loss


def teacher_temperature_at(epoch: int, *, start: float, end: float, warmup_epochs: int) -> float:
    """Per-epoch teacher temperature, as released: linspace(start, end, n)[epoch], then `end`."""
    if epoch >= warmup_epochs:
        return end
    return start + (end - start) * epoch / max(warmup_epochs - 1, 1)
