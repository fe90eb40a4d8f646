"""InfoNCE whose negatives are the other rows of the batch, on all ranks (MGC).

Shapes: n rows of a rank, B rows of all ranks, D width.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from mugs import distributed
from mugs.losses.blocked import without_autocast


def batch_info_nce_loss(
    query_nD: Tensor,
    key_nD: Tensor,
    temperature: float,
    *,
    weights_n: Tensor | None = None,
    ignored_n: Tensor | None = None,
) -> Tensor:
    """Return the mean over rows of -log of the share of the key of a row among those of all rows.

    Every rank has as many rows, and keys have no gradient. Averaged over ranks, loss and gradient
    are those of the whole batch. Without weights it is the plain mean.

    Args:
        query_nD: rows of the student, of any length.
        key_nD: the row of the teacher that belongs to each.
        temperature: divides the cosines.
        weights_n: weights >= 0 of the rows in the mean.
        ignored_n: true for rows that are neither queries nor keys.
    """
    rows = len(query_nD)
    with without_autocast(query_nD):
        query_nD = F.normalize(query_nD.float(), dim=-1)
        key_BD = _gather(F.normalize(key_nD.detach().float(), dim=-1))
        logits_nB = query_nD @ key_BD.T / temperature
        if ignored_n is not None:
            own = torch.ones_like(ignored_n) if weights_n is None else weights_n
            weights_n = torch.where(ignored_n, 0.0, own.float())
            # Not minus infinity: the row of an ignored query would become NaN.
            logits_nB = logits_nB.masked_fill(_gather(ignored_n), torch.finfo().min)
        # Rows of all ranks are in rank order.
        first = 0 if query_nD.is_meta else distributed.rank() * rows
        target_n = torch.arange(first, first + rows, device=query_nD.device)
        if weights_n is None:
            return F.cross_entropy(logits_nB, target_n)
        loss_n = F.cross_entropy(logits_nB, target_n, reduction="none")
        weights_n = weights_n.float()
        # The mean over ranks of weights is the divisor, so that the mean of losses is the whole's.
        total = weights_n.sum() if weights_n.is_meta else _mean_over_ranks(weights_n.sum())
        return (weights_n * loss_n).sum() / total.clamp_min(torch.finfo().tiny)


def _gather(rows: Tensor) -> Tensor:
    # A FLOP count on meta tensors asks no other rank.
    return rows if rows.is_meta else distributed.all_gather_rows(rows)


def _mean_over_ranks(value: Tensor) -> Tensor:
    return distributed.all_reduce_mean(value)
