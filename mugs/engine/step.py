"""The optimizer step of trainings without a teacher, and what it shares with pretraining.

`mugs.pretrain.step.Trainer` is the step of pretraining.
"""

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
    """Tensors of a step on the device: total and losses by name, as means over this rank's images.

    `finite` is false if a loss or gradient of any rank is not finite. All ranks agree on it.
    """

    total: Tensor
    losses: dict[str, Tensor]
    finite: Tensor


def run_train_step(
    optimizer: torch.optim.Optimizer, rates: RateSchedule, step: int, backward: Callable[[], Losses]
) -> StepResult:
    """Run optimizer step `step` on the gradients that `backward` leaves.

    A step that is not finite on any rank changes nothing. The optimizer is a fused one, and there
    is no host sync.
    """
    apply_rate_schedule(optimizer, rates, step)
    optimizer.zero_grad(set_to_none=True)
    total, losses = backward()
    # A limit of 0: only the norms are needed, which show a NaN or infinity of any gradient.
    norms = clip_each_tensor([p for group in optimizer.param_groups for p in group["params"]], 0.0)
    # All ranks must decide alike, or their weights drift apart.
    finite = distributed.all_reduce_and(torch.isfinite(norms).all() & torch.isfinite(total))
    update_if_finite(optimizer, finite)
    return StepResult(total, losses, finite)


def sync_gradients(model: nn.Module, *, last: bool) -> AbstractContextManager[None]:
    """Return a context in which backward averages gradients over ranks if `last`."""
    # DDP would otherwise all-reduce after every micro-batch, with the same result.
    return (
        model.no_sync()
        if isinstance(model, DistributedDataParallel) and not last
        else nullcontext()
    )


def compute_micro_batch_size(batch_size: int, most: int | None) -> int:
    """Return how many images of this rank run in one pass: `most` at most, None for all.

    Raises:
        ValueError: the batch does not divide by the ranks, or their share by the micro-batch.
    """
    world = distributed.world_size()
    if batch_size % world:
        raise ValueError(f"batch_size {batch_size} does not divide over {world} ranks")
    share = batch_size // world
    micro = min(share, most or share)
    # Equal parts only: the mean of their means is then the mean over the batch.
    if share % micro:
        raise ValueError(f"{share} images per rank do not divide into micro-batches of {micro}")
    return micro
