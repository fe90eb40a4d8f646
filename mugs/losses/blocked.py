"""The two losses over many columns in blocks of rows, their gradients computed on the way forward.

Autograd would keep the (rows, 65,536) fp32 logits, their exponentials and their gradients several times over. Here
the queue logits live for one block only, and of the group loss one gradient is kept, in the precision of the logits.
T teacher crops, P student crops, N images, R = P * N rows, D width, K queue length or prototypes.
"""

from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor

BLOCK_ELEMENTS = 1 << 24  # 64 MiB of fp32 at a time


def rows_per_block(columns: int) -> int:
    """Rows of a block."""
    return max(1, BLOCK_ELEMENTS // columns)


def without_autocast(x: Tensor) -> AbstractContextManager[None]:
    """Leave mixed precision, which a meta tensor (of a FLOP count) does not know."""
    return nullcontext() if x.is_meta else torch.autocast(x.device.type, enabled=False)


class QueueLogSumExp(torch.autograd.Function):
    """logsumexp over k of x . q_k / temperature; the queue has no gradient."""

    @staticmethod
    def forward(ctx: Any, x_RD: Tensor, queue_KD: Tensor, temperature: float) -> Tensor:
        """(R, D) and (K, D) -> (R,); keeps the (R, D) gradient softmax(x q^T / temperature) q / temperature."""
        size, results, gradients = rows_per_block(len(queue_KD)), [], []
        for block_BD in torch.split(x_RD, size):
            logits_BK = (block_BD @ queue_KD.T).float().div_(temperature)
            result_B = torch.logsumexp(logits_BK, dim=-1)
            results.append(result_B)
            if ctx.needs_input_grad[0]:
                share_BK = logits_BK.sub_(result_B[:, None]).exp_()
                gradients.append((share_BK @ queue_KD).to(x_RD.dtype) / temperature)
        if gradients:
            ctx.save_for_backward(torch.cat(gradients))
        return torch.cat(results)

    @staticmethod
    def backward(ctx: Any, *outer: Tensor) -> tuple[Tensor, None, None]:
        """Scale the gradient."""
        (gradient_RD,) = ctx.saved_tensors
        return outer[0][:, None] * gradient_RD, None, None


class ClusteringCrossEntropy(torch.autograd.Function):
    """Mean over images of sum_p [ W_p logsumexp(z_p) - m_p . z_p ], z = student / temperature.

    W_p is the sum over t of w_tp, m_p that of w_tp q_t: with q_t summing to one, this is the weighted mean over pairs
    of -sum_k q_tk log softmax(z_p)_k. Gradient: (W_p softmax(z_p) - m_p) / (N temperature).
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
    ) -> Tensor:
        """The loss; keeps its gradient with respect to the student logits."""
        num_crops, num_images, columns = student_PNK.shape
        size, total = max(1, rows_per_block(columns) // num_crops), center_K.new_zeros(())
        gradient_PNK = torch.empty_like(student_PNK) if ctx.needs_input_grad[0] else None
        for first in range(0, num_images, size):
            part = slice(first, first + size)
            shifted_TBK = teacher_TNK[:, part].float() - center_K
            assigned_TBK = torch.softmax(shifted_TBK / teacher_temperature, dim=-1)
            scaled_PBK = student_PNK[:, part].float() / student_temperature
            result_PB = torch.logsumexp(scaled_PBK, dim=-1)
            for crop, scaled_BK in enumerate(scaled_PBK):
                mixed_BK = torch.einsum("t,tbk->bk", weights_TP[:, crop], assigned_TBK)
                weight = weights_TP[:, crop].sum()
                total += (weight * result_PB[crop] - (mixed_BK * scaled_BK).sum(dim=-1)).sum()
                if gradient_PNK is not None:
                    share_BK = scaled_BK.sub_(result_PB[crop][:, None]).exp_().mul_(weight)
                    gradient_PNK[crop, part] = share_BK.sub_(mixed_BK).div_(
                        num_images * student_temperature
                    )
        if gradient_PNK is not None:
            ctx.save_for_backward(gradient_PNK)
        return total / num_images

    @staticmethod
    def backward(ctx: Any, *outer: Tensor) -> tuple[Tensor, None, None, None, None, None]:
        """Scale the gradient."""
        (gradient_PNK,) = ctx.saved_tensors
        return outer[0].to(gradient_PNK.dtype) * gradient_PNK, None, None, None, None, None
