"""Stochastic depth with masks from outside, which depend on the sample and not on the rank."""

import torch
from torch import Tensor, nn

from mugs.random_streams import StepStream, step_seed


class StochasticDepth(nn.Module):
    """Drop a residual branch per sample; divide kept branches by the keep probability.

    `uniform` holds one draw from U(0, 1) per sample of the next pass. Without it every branch is
    kept.
    """

    def __init__(self, rate: float) -> None:
        super().__init__()
        self.rate = rate
        self.uniform: Tensor | None = None

    def forward(self, branch: Tensor) -> Tensor:
        """(N, L, D) -> (N, L, D)."""
        if self.rate == 0.0 or self.uniform is None:
            return branch
        keep = 1.0 - self.rate
        # 0 or 1 / keep: the expected value is that of the full branch, so a pass without draws
        # needs no factor.
        mask = (self.uniform < keep).to(branch.dtype) / keep
        return branch * mask[:, None, None]


def draw_depth_uniforms(
    seed: int, step: int, *, branches: int, crops: int, batch_size: int
) -> Tensor:
    """Return draws (branches, crops, batch_size) from U(0, 1) for a step of the global batch.

    They are a function of (seed, step) alone, and each rank takes the columns of its own samples.
    So neither the number of ranks nor a restart changes a mask.
    """
    generator = torch.Generator().manual_seed(step_seed(seed, step, StepStream.STOCHASTIC_DEPTH))
    return torch.rand(branches, crops, batch_size, generator=generator)
