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

# fp32 logits in memory at a time: 64 MiB on a CPU. On a GPU 256 MiB, as a small block does not pay
# the launch of its kernels.
BLOCK_ELEMENTS = {"cpu": 1 << 24, "cuda": 1 << 26}


def rows_per_block(columns: int, device: torch.device) -> int:
    """Return how many rows of `columns` logits make a block on a device."""
    elements = BLOCK_ELEMENTS["cuda" if device.type == "cuda" else "cpu"]
    return max(1, elements // columns)


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
        # fp32 from here on: bf16 has too few digits for a sum of 65,536 exponentials.
        scaled_RD = x_RD.float() / temperature
        for block_BD in torch.split(scaled_RD, rows_per_block(len(queue_KD), x_RD.device)):
            # In place: the exponentials take the memory of the logits.
            logits_BK = block_BD @ queue_KD.T
            most_B1 = logits_BK.amax(dim=-1, keepdim=True)
            exponentials_BK = logits_BK.sub_(most_B1).exp_()
            sum_B1 = exponentials_BK.sum(dim=-1, keepdim=True)
            results.append((sum_B1.log() + most_B1).flatten())
            if ctx.needs_input_grad[0]:
                # d/dx logsumexp(x q^T / t) = softmax(x q^T / t) q / t, and the sum of exponentials
                # that makes a softmax of them divides D columns instead of K.
                gradient_BD = (exponentials_BK @ queue_KD).div_(sum_B1 * temperature)
                gradients.append(gradient_BD.to(x_RD.dtype))
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

    It is the mean over images of -sum_p <m_p, log softmax(z_p)>, with z the student logits divided
    by their temperature, and m_p the sum over t of w_tp q_t: what the teacher assigns, mixed.

    So it is the weighted mean over pairs of -sum_k q_tk log softmax(z_p)_k. With W_p the sum over t
    of w_tp, the gradient with respect to the student logits is
    (W_p softmax(z_p) - m_p) / (N temperature).

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
        size = max(1, rows_per_block(columns, student_PNK.device) // num_crops)
        of_crop_P = weights_TP.sum(dim=0)
        of_image_N1 = center_K.new_full((num_images, 1), 1 / max(num_images, 1))
        if image_weights_N is not None:
            of_image_N1 = image_weights_N[:, None].to(center_K.dtype)
        terms_PN = center_K.new_zeros(num_crops, num_images)
        gradient_PNK = torch.empty_like(student_PNK) if ctx.needs_input_grad[0] else None
        for first in range(0, num_images, size):
            part = slice(first, first + size)

            # Centering and sharpening of the teacher: q_t = softmax((z_t - c) / temperature).
            centered_TBK = teacher_TNK[:, part].float() - center_K
            assigned_TBK = torch.softmax(centered_TBK.div_(teacher_temperature), dim=-1)

            # One student crop at a time: its mixture of assignments is as large as its logits.
            for crop in range(num_crops):
                scaled_BK = student_PNK[crop, part].float() / student_temperature
                log_shares_BK = torch.log_softmax(scaled_BK, dim=-1)
                mixed_BK = mix_assignments(assigned_TBK, weights_TP[:, crop], out=scaled_BK)
                if gradient_PNK is not None:
                    gradient_BK = log_shares_BK.exp().mul_(of_crop_P[crop]).sub_(mixed_BK)
                    scale_B1 = of_image_N1[part] / student_temperature
                    torch.mul(gradient_BK, scale_B1, out=gradient_PNK[crop, part])
                terms_PN[crop, part] = mixed_BK.mul_(log_shares_BK).sum(dim=-1)
        if gradient_PNK is not None:
            ctx.save_for_backward(gradient_PNK)
        return -(terms_PN * of_image_N1[:, 0]).sum()

    @staticmethod
    def backward(ctx: Any, *outer: Tensor) -> tuple[Tensor | None, ...]:
        """Scale the kept gradient."""
        (gradient_PNK,) = ctx.saved_tensors
        return outer[0].to(gradient_PNK.dtype) * gradient_PNK, *[None] * 6


def mix_assignments(assigned_TBK: Tensor, weights_T: Tensor, out: Tensor) -> Tensor:
    """Write the weighted sum of assignments of the T teacher crops to `out` (B, K); return it."""
    # Multiplied and added, not contracted: TF32 would round the weights, and the mixture would no
    # longer sum to theirs.
    torch.mul(assigned_TBK[0], weights_T[0], out=out)
    for assigned_BK, weight in zip(assigned_TBK[1:], weights_T[1:], strict=True):
        out.addcmul_(assigned_BK, weight)
    return out
