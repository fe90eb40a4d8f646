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

# Below this rate, to gather and add back the samples costs about what the dropped ones save.
LEAST_SKIPPED_RATE = 0.05


@dataclass(frozen=True)
class KeptSamples:
    """The samples whose branch is kept, as indices (K,) on the device, and the branch's factor."""

    rows: Tensor
    factor: float


Drawn = KeptSamples | Tensor | None
"""What a branch does in the next pass: run on the kept samples only; or run on all, its output
multiplied by factors (N,), 0 or 1 / keep probability; or run on all as it is.
"""


class StochasticDepth(nn.Module):
    """Drop a residual branch per sample; divide kept branches by the keep probability.

    `drawn` is set before each pass (`mugs.models.vit.ViT.set_depth_uniforms`). Of kept samples,
    `add_branch` takes care.
    """

    def __init__(self, rate: float) -> None:
        super().__init__()
        self.rate = rate
        self.drawn: Drawn = None

    def forward(self, branch: Tensor) -> Tensor:
        """(N, L, D) -> (N, L, D): scale the output of a branch that ran on all samples."""
        if self.drawn is None:
            return branch
        assert isinstance(self.drawn, Tensor), "kept samples are for `add_branch`"
        return branch * self.drawn.to(branch.dtype)[:, None, None]


def add_branch(x: Tensor, depth: StochasticDepth, branch: Callable[[Tensor], Tensor]) -> Tensor:
    """Return x + depth(branch(x)), where the branch runs on the samples that `depth` keeps."""
    kept = depth.drawn
    if not isinstance(kept, KeptSamples):
        whole: Tensor = x + depth(branch(x))
        return whole
    trunk, part = TakeRows.apply(x, kept.rows)
    added: Tensor = AddToRows.apply(trunk, branch(part), kept.rows, kept.factor)
    return added


class TakeRows(torch.autograd.Function):
    """x (N, L, D) and a copy (K, L, D) of its rows. Together, because their gradients are added."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, rows: Tensor) -> tuple[Tensor, Tensor]:
        """Return x and its rows."""
        ctx.save_for_backward(rows)
        return x.view_as(x), x.index_select(0, rows)

    @staticmethod
    def backward(ctx: Any, *outer: Tensor) -> tuple[Tensor, None]:
        """Add the gradient of the rows to that of x."""
        (rows,) = ctx.saved_tensors
        # No row comes twice, so the order of the additions does not matter.
        return outer[0].index_add(0, rows, outer[1]), None


class AddToRows(torch.autograd.Function):
    """x (N, L, D) with factor * branch (K, L, D) added to its rows."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, branch: Tensor, rows: Tensor, factor: float) -> Tensor:
        """Return the sum, in the precision of x."""
        ctx.save_for_backward(rows)
        ctx.factor = factor
        ctx.branch_dtype = branch.dtype
        return x.index_add(0, rows, branch.to(x.dtype), alpha=factor)

    @staticmethod
    def backward(ctx: Any, *outer: Tensor) -> tuple[Tensor, Tensor, None, None]:
        """Hand the gradient on to x, and its rows to the branch."""
        (rows,) = ctx.saved_tensors
        of_branch = outer[0].index_select(0, rows).mul_(ctx.factor)
        return outer[0], of_branch.to(ctx.branch_dtype), None, None


def plan_branches(
    uniforms: Tensor, rates: Sequence[float], device: torch.device, *, skip_dropped: bool
) -> list[Drawn]:
    """Return what each branch does in a pass with draws (branches, N) on the CPU.

    With `skip_dropped`, branches of a rate from `LEAST_SKIPPED_RATE` on are computed for the kept
    samples only. Without it no shape depends on the draws.
    """
    keep = 1 - torch.tensor(rates, dtype=torch.float64)[:, None]
    kept = uniforms < keep.to(uniforms.dtype)
    skipped = [skip_dropped and rate >= LEAST_SKIPPED_RATE for rate in rates]
    factors = copy_to_device((kept / keep).to(uniforms.dtype), device)
    drawn: list[Drawn] = [
        factors[index] if rate > 0 and not skip else None
        for index, (rate, skip) in enumerate(zip(rates, skipped, strict=True))
    ]

    # A branch that drops every sample runs on one of them, with the factor 0: its parameters then
    # have a gradient like all others, which DDP waits for.
    counts = kept.sum(dim=1).tolist()
    kept[:, 0] |= torch.tensor([count == 0 for count in counts])
    kept &= torch.tensor(skipped)[:, None]
    # One copy for all branches.
    rows = copy_to_device(kept.nonzero()[:, 1], device)
    parts = torch.split(rows, kept.sum(dim=1).tolist())
    for index, (part, count) in enumerate(zip(parts, counts, strict=True)):
        if skipped[index]:
            drawn[index] = KeptSamples(part, 1 / (1 - rates[index]) if count else 0.0)
    return drawn


def draw_depth_uniforms(
    seed: int, step: int, *, branches: int, crops: int, batch_size: int
) -> Tensor:
    """Return draws (branches, crops, batch_size) from U(0, 1) for a step of the global batch.

    They are a function of (seed, step) alone, and each rank takes the columns of its own samples.
    So neither the number of ranks nor a restart changes a mask.
    """
    generator = torch.Generator().manual_seed(step_seed(seed, step, StepStream.STOCHASTIC_DEPTH))
    return torch.rand(branches, crops, batch_size, generator=generator)
