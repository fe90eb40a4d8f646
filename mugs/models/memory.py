"""First-in first-out stores of past features: the InfoNCE queue and the local-group memory.

Pointers are tensors and filtering happens by index, so that no call waits for the device.
Shapes: K slots, D width, B rows of the global batch in sample order, N queries.
"""

from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

PointerRule = Literal["released", "fifo"]


def seeded_normal(rows: int, width: int, seed: int) -> Tensor:
    """N(0, 1) table from a seed of its own: equal on all ranks, and after a restart, by construction."""
    return torch.randn(rows, width, generator=torch.Generator().manual_seed(seed))


class Queue(nn.Module):
    """Negatives of InfoNCE: K unit vectors, the oldest overwritten first."""

    rows: Tensor
    pointer: Tensor

    def __init__(self, size: int, width: int, *, seed: int) -> None:
        super().__init__()
        self.register_buffer("rows", F.normalize(seeded_normal(size, width, seed), dim=-1))
        self.register_buffer("pointer", torch.zeros((), dtype=torch.int64))

    @torch.no_grad()
    def enqueue(self, new: Tensor, valid: Tensor) -> None:
        """Write (B, D) rows at the pointer unless `valid` is false. Raises ValueError when they do not fit."""
        size = len(self.rows)
        if len(new) > size:
            raise ValueError(
                f"{len(new)} rows do not fit into a queue of {size}: enlarge queue_size"
            )
        slots = (self.pointer + torch.arange(len(new), device=new.device)) % size
        self.rows[slots] = torch.where(valid, new.to(self.rows.dtype), self.rows[slots])
        self.pointer.add_(len(new) * valid).remainder_(size)


class NeighbourMemory(nn.Module):
    """The local-group memory: nearest neighbours of a query by cosine, raw rows returned.

    `pointer_rule="released"`: after n rows written without passing the end, the pointer moves on by 2n (row M1 of
    the list of discrepancies: half of the slots of a ViT-S teacher memory are never written); "fifo" moves by n.
    `common_start=False` starts the table that is compared and the one that is handed out from different draws, as
    released (M33).
    """

    compare: Tensor
    separate: Tensor | None
    pointer: Tensor

    def __init__(
        self,
        size: int,
        width: int,
        *,
        seed: int,
        pointer_rule: PointerRule = "released",
        common_start: bool = True,
    ) -> None:
        super().__init__()
        self.pointer_rule = pointer_rule
        self.register_buffer("compare", seeded_normal(size, width, seed))
        self.register_buffer(
            "separate", None if common_start else seeded_normal(size, width, seed + 1)
        )
        self.register_buffer("pointer", torch.zeros((), dtype=torch.int64))

    @property
    def handed_out(self) -> Tensor:
        """The table (K, D) whose rows are returned: the compared one unless the two started apart."""
        return self.compare if self.separate is None else self.separate

    def neighbours(self, query: Tensor, num: int) -> Tensor:
        """The `num` stored rows (N, num, D) most similar to each query (N, D), most similar first."""
        return self.handed_out[self.nearest(query, num)]

    @torch.no_grad()
    def nearest(self, query: Tensor, num: int) -> Tensor:
        """Their slots, (N, num)."""
        similarity = F.normalize(query.float(), dim=-1) @ F.normalize(self.compare, dim=-1).T
        return similarity.topk(num, dim=-1).indices

    @torch.no_grad()
    def write(self, new: Tensor, accept: Tensor) -> None:
        """Write the accepted rows of (B, D), in order, at the pointer. Raises ValueError when they do not fit."""
        size, count = len(self.compare), len(new)
        if count > size:
            raise ValueError(
                f"{count} rows do not fit into a memory of {size}: enlarge memory_size"
            )
        order = torch.argsort(~accept, stable=True)
        accepted = accept.sum()
        position = torch.arange(count, device=new.device)
        slots = (self.pointer + position) % size
        written = (position < accepted)[:, None]
        for table in (self.compare, self.separate):
            if table is not None:
                table[slots] = torch.where(written, new[order].to(table.dtype), table[slots])
        self.pointer.copy_(self._advance(accepted, size))

    def _advance(self, accepted: Tensor, size: int) -> Tensor:
        once = (self.pointer + accepted) % size
        if self.pointer_rule == "fifo":
            return once
        twice = (self.pointer + 2 * accepted) % size
        return torch.where(self.pointer + accepted > size, once, twice)
