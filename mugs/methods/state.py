"""What Mugs keeps of past steps: queues, memories and centre, and the features they are made of.

N images of a micro-batch, B of the global batch, D width, K prototypes.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from mugs.distributed import all_gather_rows
from mugs.methods.config import MugsConfig
from mugs.models.memory import NegativeQueue, NeighborMemory
from mugs.random_streams import StateStream, state_seed


@dataclass(frozen=True)
class MicroBatchFeatures:
    """What a micro-batch hands to `Mugs.refresh`: crops (2, N, D), mean teacher logits (K,), memory rows (N, D)."""

    instance: Tensor | None
    local_group: Tensor | None
    mean_logits: Tensor | None
    student_memory: Tensor | None
    teacher_memory: Tensor | None
    weak: Tensor


class ExtraState(nn.Module):
    """Queues, memories and centre: equal on all ranks, frozen within an optimizer step.

    A queue or memory is None when its loss is off; with shared memories the teacher's serves both networks.
    """

    center: Tensor
    instance_queue: NegativeQueue | None
    local_group_queue: NegativeQueue | None
    student_memory: NeighborMemory | None
    teacher_memory: NeighborMemory | None

    def __init__(self, config: MugsConfig, width: int, seed: int) -> None:
        super().__init__()
        instance, local_group, _ = config.loss_weights
        self.instance_queue = (
            NegativeQueue(
                config.queue_size,
                config.head_out,
                seed=state_seed(seed, StateStream.INSTANCE_QUEUE),
            )
            if instance
            else None
        )
        self.local_group_queue = self.student_memory = self.teacher_memory = None
        if local_group:
            self.local_group_queue = NegativeQueue(
                config.queue_size,
                config.head_out,
                seed=state_seed(seed, StateStream.LOCAL_GROUP_QUEUE),
            )
            self.teacher_memory = self._memory(
                config, width, state_seed(seed, StateStream.TEACHER_MEMORY)
            )
            if config.memories == "released":
                self.student_memory = self._memory(
                    config, width, state_seed(seed, StateStream.STUDENT_MEMORY)
                )
        self.register_buffer("center", torch.zeros(config.num_prototypes))

    @staticmethod
    def _memory(config: MugsConfig, width: int, seed: int) -> NeighborMemory:
        return NeighborMemory(
            config.memory_size,
            width,
            seed=seed,
            pointer_rule=config.memory_pointer,
            common_start=config.memory_start == "common",
        )


def gather_features(features: Sequence[MicroBatchFeatures]) -> dict[str, Tensor]:
    """Rows (B, ...) of the global batch in sample order, for every field there is: one all-gather for all of them."""
    local = {}
    for name in ("instance", "local_group", "student_memory", "teacher_memory", "weak"):
        parts = [getattr(f, name) for f in features]
        if parts[0] is not None:
            images_first = [part.movedim(1, 0) if part.ndim == 3 else part for part in parts]
            local[name] = torch.cat(images_first).float()
    packed = torch.cat(
        [value.flatten(1) if value.ndim > 1 else value[:, None] for value in local.values()], dim=1
    )
    widths = [value[0].numel() for value in local.values()]
    columns = torch.split(all_gather_rows(packed), widths, dim=1)
    return {
        n: c.reshape(-1, *value.shape[1:])
        for (n, value), c in zip(local.items(), columns, strict=True)
    }
