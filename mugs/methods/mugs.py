"""Mugs: instance, local-group and group discrimination between a student and a teacher.

The teacher is the exponential moving average (EMA) of the student. Where to look:

    InfoNCE loss and its temperature      `Mugs.compute_losses`, mugs/losses/info_nce.py; its
                                          negatives: `QueueLogSumExp`, mugs/losses/blocked.py
    centering of the teacher's logits     subtraction: `ClusteringCrossEntropy`, in
                                          mugs/losses/blocked.py
    queues and memories of past features  `Mugs.update_extra_state`, mugs/models/memory.py
    EMA of the teacher, update of the center
                                          mugs/methods/teacher.py

Shapes: N images of a micro-batch, B of the global batch, D width, K prototypes.
"""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from mugs.data.loading.batch import Views
from mugs.data.views.annotate import Annotate
from mugs.losses.clustering import clustering_loss, teacher_temperature_at
from mugs.losses.info_nce import info_nce_loss
from mugs.losses.pairs import pair_weights
from mugs.methods.annotations import annotate_strength
from mugs.methods.base import Method
from mugs.methods.config import MugsConfig
from mugs.methods.network import MugsNetwork, NetworkOutputs, build_network
from mugs.methods.state import ExtraState, MicroBatchFeatures, gather_features
from mugs.methods.teacher import start_as_copy, update_center

LEVELS = ("instance", "local_group", "group")


class Mugs(Method):
    """The method as the engine sees it; `mugs.methods.base.Method` explains the calls."""

    config: MugsConfig
    student: MugsNetwork
    teacher: MugsNetwork
    extra_state: ExtraState

    def __init__(self, config: MugsConfig, *, seed: int = 0) -> None:
        if min(config.loss_weights) < 0 or sum(config.loss_weights) <= 0:
            raise ValueError(f"loss_weights must be >= 0 and not all 0, got {config.loss_weights}")
        self.config = config
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            self.student = build_network(config, student=True)
            self.teacher = build_network(config, student=False)

        # Predictors exist in the student only.
        start_as_copy(self.teacher, self.student)

        self.extra_state = ExtraState(config, self.student.backbone.embed_dim, seed)
        # Normalized here, as the engine adds up weight * loss. The release divides by the weights
        # without multiplying (M5); both are equal at 1/1/1.
        used = {n: w for n, w in zip(LEVELS, config.loss_weights, strict=True) if w > 0}
        multiplies = config.loss_sum == "weighted"
        self.loss_weights = {
            name: (weight if multiplies else 1.0) / sum(used.values())
            for name, weight in used.items()
        }

    @property
    def annotate(self) -> Annotate:
        """Return what tells whether the large student crops of an image are weak."""
        return annotate_strength

    def compute_losses(
        self, student: Callable[..., NetworkOutputs], views: Views, epoch: int
    ) -> tuple[dict[str, Tensor], MicroBatchFeatures]:
        """Return the mean losses of a micro-batch by name, with gradient, and its features."""
        config = self.config
        state = self.extra_state
        with torch.no_grad():
            teacher: NetworkOutputs = self.teacher([views.large[:2]], state.teacher_memory)
        memory = state.teacher_memory if state.student_memory is None else state.student_memory
        out = student([views.large[-2:], views.small], memory)

        weights = pair_weights(2, 2 + len(views.small), 2, config.pair_average, views.large.device)
        losses: dict[str, Tensor] = {}
        for name, queue, temperature in (
            ("instance", state.instance_queue, config.instance_temperature),
            ("local_group", state.local_group_queue, config.local_group_temperature),
        ):
            if queue is not None:
                losses[name] = info_nce_loss(
                    getattr(out, name), getattr(teacher, name), queue.rows, weights, temperature
                )
        if out.group is not None and teacher.group is not None:
            losses["group"] = clustering_loss(
                out.group,
                teacher.group,
                state.center,
                weights,
                student_temperature=config.group_student_temperature,
                teacher_temperature=teacher_temperature_at(
                    epoch,
                    start=config.group_teacher_temperature[0],
                    end=config.group_teacher_temperature[1],
                    warmup_epochs=config.group_teacher_warmup_epochs,
                ),
            )

        features = MicroBatchFeatures(
            instance=teacher.instance,
            local_group=teacher.local_group,
            mean_logits=None if teacher.group is None else teacher.group.float().mean(dim=(0, 1)),
            student_memory=out.memory,
            teacher_memory=teacher.memory,
            weak=views.extras["weak"],
        )
        return losses, features

    @torch.no_grad()
    def update_extra_state(self, features: Sequence[MicroBatchFeatures], valid: Tensor) -> None:
        """Write the features of a valid step into queues and memories, and move the center.

        Rows are written in global sample order, so the state does not depend on the number of ranks
        or micro-batches.
        """
        state = self.extra_state
        rows_of = gather_features(features)

        # Both teacher crops of an image become negatives: 2B rows per step.
        for queue, field in (
            (state.instance_queue, "instance"),
            (state.local_group_queue, "local_group"),
        ):
            if queue is not None:
                for crop in rows_of[field].unbind(1):
                    queue.enqueue(crop, valid)

        if state.teacher_memory is not None:
            student_rows = rows_of["student_memory"]
            accept = valid.expand(len(student_rows))
            # The student's own memory takes weakly augmented images only (released), a shared one
            # all.
            if state.student_memory is not None:
                state.student_memory.write(student_rows, accept & rows_of["weak"].bool())
            state.teacher_memory.write(rows_of["teacher_memory"], accept)
            if state.student_memory is None:
                state.teacher_memory.write(student_rows, accept)
        means = [f.mean_logits for f in features if f.mean_logits is not None]
        if means:
            update_center(state.center, means, self.config.center_momentum, valid)

    def last_layer_parameters(self) -> list[nn.Parameter]:
        """Return the prototypes, which get no update in the first epochs."""
        head = self.student.group_head
        return [] if head is None else list(head.last_layer.parameters())

    def projection(self) -> nn.Linear | None:
        """Return the first layer of the teacher's group head, if that loss is on."""
        head = self.teacher.group_head
        return None if head is None else head.input_layer
