"""Batch normalization over the rows of all ranks."""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mugs import distributed

EPS = 1e-5


class AllRanksBatchNorm(nn.Module):
    """Batch normalization with the statistics of the batch over all ranks, of as many rows each.

    It has no running statistics: heads exist in pretraining only, where no network is in eval mode.
    Without `affine`, it has no weight and bias either.
    """

    def __init__(self, width: int, *, affine: bool = True) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width)) if affine else None
        self.bias = nn.Parameter(torch.zeros(width)) if affine else None

    def forward(self, x: Tensor) -> Tensor:
        """Normalize (N, D), with statistics in fp32."""
        if x.is_meta:
            # A FLOP count: it counts products only, may have a single row, and asks no other rank.
            return x.clone()
        if distributed.world_size() == 1:
            return F.batch_norm(x, None, None, self.weight, self.bias, training=True, eps=EPS)
        wide = x.float()
        # Centered first: E[x^2] - E[x]^2 would cancel digits. Means of means are right here, since
        # every rank has as many rows.
        centered = wide - distributed.mean_with_grad(wide.mean(dim=0))
        variance = distributed.mean_with_grad(centered.square().mean(dim=0))
        normalized = centered * torch.rsqrt(variance + EPS)
        if self.weight is not None and self.bias is not None:
            normalized = normalized * self.weight + self.bias
        return normalized.to(x.dtype)


class AllRanksBatchNorm2d(nn.BatchNorm2d):
    """torch's BatchNorm2d whose training statistics are those of all ranks, on the CPU too.

    torch's SyncBatchNorm does that on GPUs only; `convert_to_sync_batch_norm` uses it there.
    """

    def forward(self, x: Tensor) -> Tensor:
        """Normalize (N, C, H, W); ranks may hold different numbers of pixels."""
        if not self.training or distributed.world_size() == 1:
            return super().forward(x)
        wide = x.float()
        # Sums and a summed count, not means of means: a rank may hold fewer pixels than another.
        count = distributed.sum_with_grad(wide.new_tensor([float(wide[:, 0].numel())]))
        mean = distributed.sum_with_grad(wide.sum(dim=(0, 2, 3))) / count
        centered = wide - mean[:, None, None]
        variance = distributed.sum_with_grad(centered.square().sum(dim=(0, 2, 3))) / count
        # torch, too, keeps the unbiased variance and normalizes with the biased one.
        self._track(mean.detach(), variance.detach() * count / (count - 1))
        scale = torch.rsqrt(variance + self.eps) * self.weight
        return (centered * scale[:, None, None] + self.bias[:, None, None]).to(x.dtype)

    @torch.no_grad()
    def _track(self, mean: Tensor, variance: Tensor) -> None:
        assert self.running_mean is not None
        assert self.running_var is not None
        assert self.num_batches_tracked is not None
        assert self.momentum is not None
        self.num_batches_tracked.add_(1)
        self.running_mean.lerp_(mean, self.momentum)
        self.running_var.lerp_(variance, self.momentum)


def convert_to_sync_batch_norm(model: nn.Module, device: torch.device) -> nn.Module:
    """Return the model with torch's SyncBatchNorm where that works: on several ranks with GPUs."""
    if device.type != "cuda" or distributed.world_size() == 1:
        return model
    convert: Callable[[nn.Module], nn.Module] = nn.SyncBatchNorm.convert_sync_batchnorm
    return convert(model)
