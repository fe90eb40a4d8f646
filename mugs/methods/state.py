"""What Mugs keeps from past steps (queues, memories, center), and the features that update it.

Shapes: N images of a micro-batch, B of the global batch, D width, K prototypes.
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
    """What `Mugs.update_extra_state` needs of a micro-batch; a field is None if its loss is off.

    `instance` and `local_group` are teacher crops (2, N, D), `mean_logits` are mean teacher logits
    (K,), the memory rows are (N, D). `weak` (N,) tells which images had weak student crops.
    """

    instance: Tensor | None
    local_group: Tensor | None
    mean_logits: Tensor | None
    student_memory: Tensor | None
    teacher_memory: Tensor | None
    weak: Tensor


class ExtraState(nn.Module):
    """Queues, memories and center: equal on all ranks, and constant within an optimizer step.

    A queue or memory is None when its loss is off. A shared memory is `teacher_memory`, for both
    networks.
    """

    center: Tensor
    instance_queue: NegativeQueue | None
    local_group_queue: NegativeQueue | None
    student_memory: NeighborMemory | None
    teacher_memory: NeighborMemory | None

    def __init__(self, config: MugsConfig, width: int, seed: int) -> None:
        super().__init__()

        # Every table is drawn from its own stream of the common seed. So all ranks hold the same
        # content without a broadcast, and switching one loss off does not change the others.
        def build_queue(size: int, out: int, stream: StateStream) -> NegativeQueue:
            return NegativeQueue(size, out, seed=state_seed(seed, stream))

        def build_memory(stream: StateStream) -> NeighborMemory:
            return NeighborMemory(
                config.memory_size,
                width,
                seed=state_seed(seed, stream),
                pointer_rule=config.memory_pointer,
                common_start=config.memory_start == "common",
            )

        instance, local_group, _ = config.loss_weights
        first, second = zip(config.queue_sizes(), config.head_outs(), strict=True)
        self.instance_queue = build_queue(*first, StateStream.INSTANCE_QUEUE) if instance else None
        self.local_group_queue = self.student_memory = self.teacher_memory = None
        if local_group:
            self.local_group_queue = build_queue(*second, StateStream.LOCAL_GROUP_QUEUE)
            self.teacher_memory = build_memory(StateStream.TEACHER_MEMORY)
            if config.memories == "released":
                self.student_memory = build_memory(StateStream.STUDENT_MEMORY)
        self.register_buffer("center", torch.zeros(config.num_prototypes))


def gather_features(features: Sequence[MicroBatchFeatures]) -> dict[str, Tensor]:
    """Return rows (B, ...) of the global batch in sample order, for every field that is set."""
    local = {}
    for name in ("instance", "local_group", "student_memory", "teacher_memory", "weak"):
        parts = [getattr(f, name) for f in features]
        if parts[0] is not None:
            # Crops come first in (2, N, D), but rows are gathered by image.
            images_first = [part.movedim(1, 0) if part.ndim == 3 else part for part in parts]
            local[name] = torch.cat(images_first).float()

    # All fields travel side by side in one all-gather, since the latency of five would add up.
    packed = torch.cat(
        [value.flatten(1) if value.ndim > 1 else value[:, None] for value in local.values()], dim=1
    )
    widths = [value[0].numel() for value in local.values()]
    columns = torch.split(all_gather_rows(packed), widths, dim=1)
    return {
        name: column.reshape(-1, *value.shape[1:])
        for (name, value), column in zip(local.items(), columns, strict=True)
    }
