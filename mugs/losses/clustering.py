"""Group loss: clustering on prototypes, the teacher centered and sharpened (paper, section 3.3).

The loss of a pair is -sum_k q_tk log p_pk, with q_t = softmax((z_t - c) / teacher temperature) and
p_p = softmax(z_p / student temperature). The center c is subtracted in
`mugs.losses.blocked` and updated by `mugs.methods.teacher.update_center`.

Shapes: T teacher crops, P student crops, N images, K prototypes.
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
    image_weights_N: Tensor | None = None,
) -> Tensor:
    """Return the weighted mean over pairs of the cross-entropy of teacher and student assignments.

    The assignments q sum to one, so -sum q log p = logsumexp(z) - q . z, with z the scaled student
    logits. All pairs of a student crop share the first term, and the second one is linear in q.

    `image_weights_N` replaces the mean over images by a sum with these weights. An image may then
    be a row of another kind, such as a patch, which is compared with itself: T = P = 1.
    """
    # Stop-gradient: the student alone is trained on this loss.
    with without_autocast(student_PNK):
        loss: Tensor = ClusteringCrossEntropy.apply(
            student_PNK,
            teacher_TNK.detach(),
            center_K,
            weights_TP,
            student_temperature,
            teacher_temperature,
            image_weights_N,
        )
    return loss


def teacher_temperature_at(epoch: int, *, start: float, end: float, warmup_epochs: int) -> float:
    """Return linspace(start, end, warmup_epochs)[epoch], then `end`: the teacher temperature.

    Before epoch 0, where a warm-up waits for another one, it is `start`.
    """
    if epoch < 0:
        return start
    if epoch >= warmup_epochs:
        return end
    # linspace includes its end point, so `end` is reached in the last warm-up epoch (released).
    return start + (end - start) * epoch / max(warmup_epochs - 1, 1)
