"""Stochastic depth with draws from outside, which depend on the sample and not on the rank.

A residual branch that is dropped need not be computed. The draws are known on the host, so the
kept samples are gathered, the branch runs on them alone, and its output is added back.

Shapes: N samples of a pass, L tokens, D width, K kept samples.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from mugs.devices import copy_to_device
from mugs.random_streams import StepStream, step_seed


@dataclass(frozen=True)
class KeptSamples:
    """The samples whose branch is kept, as indices (K,) on the device, and the branch's factor."""

    rows: Tensor
    factor: float


class StochasticDepth(nn.Module):
    """Drop a residual branch per sample; divide kept branches by the keep probability.

    Before a pass `mugs.models.vit.ViT.set_depth_uniforms` sets `kept`, if dropped branches are
    skipped, or else `factors` (N,), 0 or 1 / keep probability. Without either, all are kept.
    """

    def __init__(self, rate: float) -> None:
        super().__init__()
        self.rate = rate
        self.kept: KeptSamples | None = None
        self.factors: Tensor | None = None

    def forward(self, branch: Tensor) -> Tensor:
        """(N, L, D) -> (N, L, D): scale the output of a branch that ran on all samples."""
        if self.factors is None:
            return branch
        return branch * self.factors.to(branch.dtype)[:, None, None]


class AddToRows(torch.autograd.Function):
    """x with factor * branch added to the rows that `kept` names."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, branch: Tensor, rows: Tensor, factor: float) -> Tensor:
        """Return (N, L, D) from (N, L, D) and (K, L, D)."""
        ctx.save_for_backward(rows)
        ctx.factor = factor
        ctx.branch_type = branch.dtype
        return x.index_add(0, rows, branch.to(x.dtype), alpha=factor)

    @staticmethod
    def backward(ctx: Any, *outer: Tensor) -> tuple[Tensor, Tensor, None, None]:
        """Hand the gradient on to x, and its rows to the branch."""
        (rows,) = ctx.saved_tensors
        of_branch = outer[0].index_select(0, rows).mul_(ctx.factor)
        return outer[0], of_branch.to(ctx.branch_type), None, None


def add_branch(x: Tensor, depth: nn.Module, branch: Callable[[Tensor], Tensor]) -> Tensor:
    """Return x + branch(x), where the branch runs on the samples that `depth` keeps."""
    if not isinstance(depth, StochasticDepth) or depth.kept is None:
        return x + depth(branch(x))
    kept = depth.kept
    # The gradient of index_select adds into zeros: rows differ, so the order does not matter.
    added: Tensor = AddToRows.apply(x, branch(x.index_select(0, kept.rows)), kept.rows, kept.factor)
    return added


def find_kept_samples(
    uniforms: Tensor, rates: Sequence[float], device: torch.device
) -> list[KeptSamples | None]:
    """Return what each branch keeps, from draws (branches, N) on the CPU; None for all samples."""
    keep = 1 - torch.tensor(rates, dtype=torch.float64)[:, None]
    kept = uniforms < keep.to(uniforms.dtype)
    counts = kept.sum(dim=1).tolist()
    # A branch that drops every sample runs on one of them, with the factor 0: its parameters then
    # have a gradient like all others, which DDP waits for.
    kept[:, 0] |= torch.tensor([count == 0 for count in counts])
    # One copy for all branches.
    rows = copy_to_device(kept.nonzero()[:, 1], device)
    parts = torch.split(rows, [max(count, 1) for count in counts])
    return [
        None if rate == 0 else KeptSamples(part, 0.0 if count == 0 else 1 / (1 - rate))
        for rate, part, count in zip(rates, parts, counts, strict=True)
    ]


def find_factors(
    uniforms: Tensor, rates: Sequence[float], device: torch.device
) -> list[Tensor | None]:
    """Return the factor (N,) of each branch, from draws (branches, N) on the CPU; None for 1."""
    keep = 1 - torch.tensor(rates, dtype=torch.float64)[:, None]
    factors = (uniforms < keep.to(uniforms.dtype)) / keep
    parts = copy_to_device(factors.to(uniforms.dtype), device)
    return [None if rate == 0 else part for rate, part in zip(rates, parts, strict=True)]


def draw_depth_uniforms(
    seed: int, step: int, *, branches: int, crops: int, batch_size: int
) -> Tensor:
    """Return draws (branches, crops, batch_size) from U(0, 1) for a step of the global batch.

    They are a function of (seed, step) alone, and each rank takes the columns of its own samples.
    So neither the number of ranks nor a restart changes a mask.
    """
    generator = torch.Generator().manual_seed(step_seed(seed, step, StepStream.STOCHASTIC_DEPTH))
    return torch.rand(branches, crops, batch_size, generator=generator)
