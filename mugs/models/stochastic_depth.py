"""Stochastic depth whose masks are handed in, so that they depend on the sample and not on the rank."""

import torch
from torch import Tensor, nn

from mugs.random_streams import StepStream, step_seed


class StochasticDepth(nn.Module):
    """Drops a residual branch per sample; kept branches are divided by the keep probability.

    `uniform` holds one draw from U(0, 1) per sample of the coming pass; without one the branch is kept.
    """

    uniform: Tensor | None

    def __init__(self, rate: float) -> None:
        super().__init__()
        self.rate = rate
        self.uniform = None

    def forward(self, branch: Tensor) -> Tensor:
        """(N, L, D) -> (N, L, D)."""
        if self.rate == 0.0 or self.uniform is None:
            return branch
        keep = 1.0 - self.rate
        mask = (self.uniform < keep).to(branch.dtype) / keep
        return branch * mask[:, None, None]


def draw_depth_uniforms(
    seed: int, step: int, *, branches: int, crops: int, batch_size: int
) -> Tensor:
    """U(0, 1) draws (branches, crops, batch_size) of one optimizer step, for the whole global batch.

    They are a function of (seed, step) alone: each rank takes the columns of its own samples, so neither the
    number of ranks nor a restart changes a mask.
    """
    generator = torch.Generator().manual_seed(step_seed(seed, step, StepStream.STOCHASTIC_DEPTH))
    return torch.rand(branches, crops, batch_size, generator=generator)
