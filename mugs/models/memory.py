"""First-in, first-out stores of past features: the InfoNCE queue and the local-group memory.

Pointers are tensors, and rows are filtered by index instead of by a mask of unknown size. So no
call makes the host wait for the device.

Shapes: K slots, D width, B rows of the global batch in sample order, N queries, k neighbors.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mugs.losses.blocked import without_autocast
from mugs.models.config import PointerRule

# Names of the buffers of NeighborMemory in checkpoints written before they were called keys and
# values.
_FORMER_NAMES = {"compare": "keys", "separate": "values"}


def draw_normal_table(rows: int, width: int, seed: int) -> Tensor:
    """Return an N(0, 1) table from its own seed: equal on all ranks and after a restart."""
    return torch.randn(rows, width, generator=torch.Generator().manual_seed(seed))


class NegativeQueue(nn.Module):
    """Negatives of InfoNCE: K unit vectors; new ones overwrite the oldest."""

    rows: Tensor
    pointer: Tensor

    def __init__(self, size: int, width: int, *, seed: int) -> None:
        super().__init__()
        self.register_buffer("rows", F.normalize(draw_normal_table(size, width, seed), dim=-1))
        self.register_buffer("pointer", torch.zeros((), dtype=torch.int64))

    @torch.no_grad()
    def enqueue(self, new: Tensor, valid: Tensor) -> None:
        """Write (B, D) rows at the pointer, unless `valid` is false.

        Raises:
            ValueError: the batch has more rows than the queue has slots.
        """
        size = len(self.rows)
        if len(new) > size:
            raise ValueError(
                f"{len(new)} rows do not fit into a queue of {size}: enlarge queue_size"
            )

        # `valid` stays on the device: an invalid step writes the old rows back and adds 0.
        slots = (self.pointer + torch.arange(len(new), device=new.device)) % size
        self.rows[slots] = torch.where(valid, new.to(self.rows.dtype), self.rows[slots])
        self.pointer.add_(len(new) * valid).remainder_(size)


class NeighborMemory(nn.Module):
    """The local-group memory: a query is compared with the keys, and the values are returned.

    A write puts the same rows into both tables, so keys and values differ only in slots that were
    never written, and only with `common_start=False`: the release draws the two tables
    independently (M33). With a common start one table serves as both, and `values` is None.

    `pointer_rule="released"` moves the pointer by 2n after n rows were written without passing the
    end (M1: half of the slots of a ViT-S teacher memory are never written); "fifo" moves it by n.
    """

    keys: Tensor
    values: Tensor | None
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
        self.register_buffer("keys", draw_normal_table(size, width, seed))
        self.register_buffer(
            "values", None if common_start else draw_normal_table(size, width, seed + 1)
        )
        self.register_buffer("pointer", torch.zeros((), dtype=torch.int64))

    def _load_from_state_dict(
        self, state_dict: dict[str, Any], prefix: str, *rest: Any, **more: Any
    ) -> None:
        for former, name in _FORMER_NAMES.items():
            if prefix + former in state_dict:
                state_dict[prefix + name] = state_dict.pop(prefix + former)
        super()._load_from_state_dict(state_dict, prefix, *rest, **more)

    def find_neighbors(self, query: Tensor, num: int) -> Tensor:
        """Return the values (N, k, D) whose keys are most similar to a query (N, D), best first."""
        values = self.keys if self.values is None else self.values
        return values[self.find_slots(query, num)]

    @torch.no_grad()
    def find_slots(self, query: Tensor, num: int) -> Tensor:
        """Return the slots (N, k) of the keys with the largest cosine to each query, best first."""
        # The keys are stored as they are (the raw rows are returned as values), hence normalized
        # here. In fp32: bf16 tells near neighbors not apart.
        with without_autocast(query):
            similarity = F.normalize(query.float(), dim=-1) @ F.normalize(self.keys, dim=-1).T
            return similarity.topk(num, dim=-1).indices

    @torch.no_grad()
    def write(self, new: Tensor, accept: Tensor) -> None:
        """Write those rows of (B, D) that `accept` (B,) selects, in order, at the pointer.

        Raises:
            ValueError: the batch has more rows than the memory has slots.
        """
        size = len(self.keys)
        count = len(new)
        if count > size:
            raise ValueError(
                f"{count} rows do not fit into a memory of {size}: enlarge memory_size"
            )

        # A stable sort moves the accepted rows to the front without asking the device how many
        # there are. All B slots are then written, those beyond the accepted rows with their old
        # content.
        order = torch.argsort(~accept, stable=True)
        num_accepted = accept.sum()
        position = torch.arange(count, device=new.device)
        slots = (self.pointer + position) % size
        written = (position < num_accepted)[:, None]
        for table in (self.keys, self.values):
            if table is not None:
                table[slots] = torch.where(written, new[order].to(table.dtype), table[slots])
        self.pointer.copy_(self._advance(num_accepted, size))

    def _advance(self, num_accepted: Tensor, size: int) -> Tensor:
        """Return the pointer after a write, by the pointer rule."""
        once = (self.pointer + num_accepted) % size
        if self.pointer_rule == "fifo":
            return once

        # The release adds n twice, except after a write that passed the end (M1). One that ends
        # exactly there has not passed it.
        twice = (self.pointer + 2 * num_accepted) % size
        return torch.where(self.pointer + num_accepted > size, once, twice)
