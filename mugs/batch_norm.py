"""Batch normalisation over the rows of all ranks."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mugs.engine import distributed


class BatchNorm(nn.Module):
    """Always normalises with the statistics of the batch at hand, ranks together (each with as many rows).

    There are no running statistics: heads are used in pretraining alone, where no network is ever in eval mode.
    """

    def __init__(self, width: int, eps: float = 1e-5) -> None:
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(width))
        self.bias = nn.Parameter(torch.zeros(width))

    def forward(self, x: Tensor) -> Tensor:
        """(N, D) -> (N, D); statistics in the precision of the weights."""
        if distributed.world_size() == 1:
            return F.batch_norm(x, None, None, self.weight, self.bias, training=True, eps=self.eps)
        wide = x.to(self.weight.dtype)
        centred = wide - distributed.mean_with_grad(wide.mean(dim=0))
        variance = distributed.mean_with_grad(centred.square().mean(dim=0))
        return (centred * torch.rsqrt(variance + self.eps) * self.weight + self.bias).to(x.dtype)
