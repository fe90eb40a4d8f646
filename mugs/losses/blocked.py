"""The two losses with many columns, in blocks of rows, with gradients computed in the forward pass.

Autograd would keep the (rows, 65,536) fp32 logits, their exponentials and their gradients at the
same time. Here the queue logits live for one block only, and the group loss keeps one gradient, in
the precision of its logits.

Shapes: T teacher crops, P student crops, N images, R = P * N rows, D width, B rows or images of a
block, K queue length or prototypes.
"""

from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor

BLOCK_ELEMENTS = 1 << 24  # 64 MiB of fp32 logits in memory at a time


def rows_per_block(columns: int) -> int:
    """Return how many rows of `columns` logits make a block."""
    return max(1, BLOCK_ELEMENTS // columns)


def without_autocast(x: Tensor) -> AbstractContextManager[None]:
    """Return a context without mixed precision.

    Meta tensors (of a FLOP count) do not support autocast.
    """
    return nullcontext() if x.is_meta else torch.autocast(x.device.type, enabled=False)


class QueueLogSumExp(torch.autograd.Function):
    """The negatives of InfoNCE: logsumexp over k of <x, q_k> / temperature.

    The queue has no gradient.
    """

    @staticmethod
    def forward(ctx: Any, x_RD: Tensor, queue_KD: Tensor, temperature: float) -> Tensor:
        """Return (R,) from (R, D) and (K, D); keep the (R, D) gradient for the backward pass."""
        results = []
        gradients = []
        for block_BD in torch.split(x_RD, rows_per_block(len(queue_KD))):
            # fp32 from here on: bf16 has too few digits for a sum of 65,536 exponentials.
            logits_BK = (block_BD @ queue_KD.T).float().div_(temperature)
            result_B = torch.logsumexp(logits_BK, dim=-1)
            results.append(result_B)
            if ctx.needs_input_grad[0]:
                # d/dx logsumexp(x q^T / t) = softmax(x q^T / t) q / t. The softmax takes the place
                # of the logits, which are not needed any more.
                softmax_BK = logits_BK.sub_(result_B[:, None]).exp_()
                gradients.append((softmax_BK @ queue_KD).to(x_RD.dtype) / temperature)
        if gradients:
            ctx.save_for_backward(torch.cat(gradients))
        return torch.cat(results)

    @staticmethod
    def backward(ctx: Any, *outer: Tensor) -> tuple[Tensor, None, None]:
        """Scale the kept gradient."""
        (gradient_RD,) = ctx.saved_tensors
        return outer[0][:, None] * gradient_RD, None, None


class ClusteringCrossEntropy(torch.autograd.Function):
    """Cross-entropy of teacher and student assignments, weighted over pairs of crops.

    It is the mean over images of sum_p [W_p logsumexp(z_p) - <m_p, z_p>], with z the student logits
    divided by their temperature.

    W_p is the sum over t of w_tp, and m_p that of w_tp q_t. Since q_t sums to one, this is the
    weighted mean over pairs of -sum_k q_tk log softmax(z_p)_k. The gradient with respect to the
    student logits is (W_p softmax(z_p) - m_p) / (N temperature).

    With a weight u_n for each image, the mean is a sum of u_n times the terms of image n, and u_n
    takes the place of 1 / N in the gradient.
    """

    @staticmethod
    def forward(
        ctx: Any,
        student_PNK: Tensor,
        teacher_TNK: Tensor,
        center_K: Tensor,
        weights_TP: Tensor,
        student_temperature: float,
        teacher_temperature: float,
        image_weights_N: Tensor | None,
    ) -> Tensor:
        """Return the loss; keep its gradient with respect to the student logits."""
        num_crops, num_images, columns = student_PNK.shape
        size = max(1, rows_per_block(columns) // num_crops)
        total = center_K.new_zeros(())
        gradient_PNK = torch.empty_like(student_PNK) if ctx.needs_input_grad[0] else None
        for first in range(0, num_images, size):
            part = slice(first, first + size)

            # Centering and sharpening of the teacher: q_t = softmax((z_t - c) / temperature).
            centered_TBK = teacher_TNK[:, part].float() - center_K
            assigned_TBK = torch.softmax(centered_TBK / teacher_temperature, dim=-1)
            scaled_PBK = student_PNK[:, part].float() / student_temperature
            log_sum_PB = torch.logsumexp(scaled_PBK, dim=-1)

            # One student crop at a time: its mixture of assignments is as large as its logits.
            for crop, scaled_BK in enumerate(scaled_PBK):
                mixed_BK = torch.einsum("t,tbk->bk", weights_TP[:, crop], assigned_TBK)
                weight = weights_TP[:, crop].sum()
                terms_B = weight * log_sum_PB[crop] - (mixed_BK * scaled_BK).sum(dim=-1)
                if image_weights_N is not None:
                    terms_B *= image_weights_N[part]
                total += terms_B.sum()
                if gradient_PNK is not None:
                    softmax_BK = scaled_BK.sub_(log_sum_PB[crop][:, None]).exp_()
                    gradient_BK = softmax_BK.mul_(weight).sub_(mixed_BK)
                    if image_weights_N is None:
                        gradient_BK.div_(num_images * student_temperature)
                    else:
                        gradient_BK.mul_(image_weights_N[part, None] / student_temperature)
                    gradient_PNK[crop, part] = gradient_BK
        if gradient_PNK is not None:
            ctx.save_for_backward(gradient_PNK)
        return total / num_images if image_weights_N is None else total

    @staticmethod
    def backward(ctx: Any, *outer: Tensor) -> tuple[Tensor | None, ...]:
        """Scale the kept gradient."""
        (gradient_PNK,) = ctx.saved_tensors
        return outer[0].to(gradient_PNK.dtype) * gradient_PNK, *[None] * 6
