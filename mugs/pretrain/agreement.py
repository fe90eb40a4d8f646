"""Check that all ranks hold the same queues, memories and center."""

import torch
from torch import Tensor, nn

from mugs import distributed

BLOCK_BYTES = 1 << 20


class StateMismatchError(RuntimeError):
    """The extra state of the method differs between ranks."""


def fingerprint_tensor(value: Tensor) -> Tensor:
    """Return two sums (2,) over the bytes of a tensor: plain, and weighted by position.

    They are exact in 64-bit integers, which may wrap. Floating-point sums would depend on their
    order.
    """
    data = value.detach().contiguous().flatten().view(torch.uint8)
    sums = torch.zeros(2, dtype=torch.int64, device=data.device)
    # Block by block: as int64 the bytes take eight times their room.
    for first in range(0, len(data), BLOCK_BYTES):
        part = data[first : first + BLOCK_BYTES].to(torch.int64)
        place = torch.arange(first + 1, first + 1 + len(part), device=data.device)
        sums += torch.stack([part.sum(), (part * place).sum()])
    return sums


def check_equal_on_all_ranks(state: nn.Module) -> None:
    """Raise StateMismatchError on all ranks, with the names of the buffers that differ.

    Costs one small all-gather of fingerprints.
    """
    if distributed.world_size() == 1:
        return
    tensors = state.state_dict()
    if not tensors:
        return  # a method may keep nothing between steps
    mine = torch.cat([fingerprint_tensor(value) for value in tensors.values()])
    of_ranks = distributed.all_gather_rows(mine[None]).view(
        distributed.world_size(), len(tensors), 2
    )
    differs = (of_ranks != of_ranks[:1]).any(dim=-1).any(dim=0).tolist()
    names = [name for name, different in zip(tensors, differs, strict=True) if different]
    if names:
        raise StateMismatchError(
            f"{', '.join(names)}: not the same on all {distributed.world_size()} ranks. "
            "The run cannot continue. "
            "Start it again to resume from the last checkpoint."
        )
