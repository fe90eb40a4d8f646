"""One optimizer step: losses of all micro-batches, refresh of the method's state, clip, update, teacher."""

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from mugs import distributed
from mugs.engine.optim import RateSchedule, apply_rate_schedule, clip_each_tensor, update_if_finite

Losses = tuple[Tensor, dict[str, Tensor]]
"""Total and losses by name, without gradient."""


@dataclass(frozen=True)
class StepResult:
    """Device tensors of one step: total and losses by name (means over this rank's images).

    `finite` is false where any rank's loss or any gradient is not finite; all ranks agree on it.
    """

    total: Tensor
    losses: dict[str, Tensor]
    finite: Tensor


def run_train_step(
    optimizer: torch.optim.Optimizer, rates: RateSchedule, step: int, backward: Callable[[], Losses]
) -> StepResult:
    """Optimizer step `step` on the gradients that `backward` leaves; not finite on any rank, it changes nothing.

    The optimizer is a fused one; nothing waits for the device.
    """
    apply_rate_schedule(optimizer, rates, step)
    optimizer.zero_grad(set_to_none=True)
    total, losses = backward()
    norms = clip_each_tensor([p for group in optimizer.param_groups for p in group["params"]], 0.0)
    finite = distributed.all_reduce_and(torch.isfinite(norms).all() & torch.isfinite(total))
    update_if_finite(optimizer, finite)
    return StepResult(total, losses, finite)


def sync_gradients(model: nn.Module, *, last: bool) -> AbstractContextManager[None]:
    """Average gradients over ranks in the last micro-batch's backward pass only."""
    return (
        model.no_sync()
        if isinstance(model, DistributedDataParallel) and not last
        else nullcontext()
    )


def compute_micro_batch_size(batch_size: int, most: int | None) -> int:
    """Images of this rank in one pass, `most` at most. Raises ValueError where they do not divide."""
    world = distributed.world_size()
    if batch_size % world:
        raise ValueError(f"batch_size {batch_size} does not divide over {world} ranks")
    share = batch_size // world
    micro = min(share, most or share)
    if share % micro:
        raise ValueError(f"{share} images per rank do not divide into micro-batches of {micro}")
    return micro
