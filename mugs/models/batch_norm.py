"""Batch normalisation over the rows of all ranks."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mugs import distributed

EPS = 1e-5


class AllRanksBatchNorm(nn.Module):
    """Always normalises with the statistics of the batch at hand, ranks together (each with as many rows).

    There are no running statistics: heads are used in pretraining alone, where no network is ever in eval mode.
    """

    def __init__(self, width: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))
        self.bias = nn.Parameter(torch.zeros(width))

    def forward(self, x: Tensor) -> Tensor:
        """(N, D) -> (N, D); statistics in the precision of the weights."""
        if (
            distributed.world_size() == 1 or x.is_meta
        ):  # a FLOP count on meta tensors asks no other rank
            return F.batch_norm(x, None, None, self.weight, self.bias, training=True, eps=EPS)
        wide = x.to(self.weight.dtype)
        centred = wide - distributed.mean_with_grad(wide.mean(dim=0))
        variance = distributed.mean_with_grad(centred.square().mean(dim=0))
        return (centred * torch.rsqrt(variance + EPS) * self.weight + self.bias).to(x.dtype)


class AllRanksBatchNorm2d(nn.BatchNorm2d):
    """torch's, with running statistics, except that on the CPU too the ranks of a process group share the batch's.

    torch's SyncBatchNorm does that on GPUs only: `synchronised` puts it in place there.
    """

    def forward(self, x: Tensor) -> Tensor:
        """(N, C, H, W) -> same; ranks may hold different numbers of pixels."""
        if not self.training or distributed.world_size() == 1:
            return super().forward(x)
        wide = x.float()
        count = distributed.sum_with_grad(wide.new_tensor([float(wide[:, 0].numel())]))
        mean = distributed.sum_with_grad(wide.sum(dim=(0, 2, 3))) / count
        centred = wide - mean[:, None, None]
        variance = distributed.sum_with_grad(centred.square().sum(dim=(0, 2, 3))) / count
        self._track(mean.detach(), variance.detach() * count / (count - 1))
        scale = torch.rsqrt(variance + self.eps) * self.weight
        return (centred * scale[:, None, None] + self.bias[:, None, None]).to(x.dtype)

    @torch.no_grad()
    def _track(self, mean: Tensor, variance: Tensor) -> None:
        assert (
            self.running_mean is not None
            and self.running_var is not None
            and self.num_batches_tracked is not None
        )
        assert self.momentum is not None
        self.num_batches_tracked.add_(1)
        self.running_mean.lerp_(mean, self.momentum)
        self.running_var.lerp_(variance, self.momentum)


def convert_to_sync_batch_norm(model: nn.Module, device: torch.device) -> nn.Module:
    """The model with torch's SyncBatchNorm where it works (several ranks on GPUs), as it is elsewhere."""
    if device.type != "cuda" or distributed.world_size() == 1:
        return model
    converted: nn.Module = nn.SyncBatchNorm.convert_sync_batchnorm(model)  # type: ignore[no-untyped-call]
    return converted
