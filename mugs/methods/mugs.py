"""Mugs: instance, local-group and group discrimination between a student and a teacher.

The teacher is the exponential moving average (EMA) of the student. Where to look:

    InfoNCE loss and its temperature      `Mugs.compute_losses`, mugs/losses/info_nce.py; its
                                          negatives: `QueueLogSumExp`, mugs/losses/blocked.py
    centering of the teacher's logits     subtraction: `ClusteringCrossEntropy`, in
                                          mugs/losses/blocked.py; the center: `Mugs._update_center`
    queues and memories of past features  `Mugs.update_extra_state`, mugs/models/memory.py
    EMA of the teacher                    `Mugs.update_teacher`

Shapes: N images of a micro-batch, B of the global batch, D width, K prototypes.
"""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from mugs.data.loading.batch import Views
from mugs.data.views.config import ViewRecipe
from mugs.distributed import all_reduce_mean
from mugs.losses.clustering import clustering_loss, teacher_temperature_at
from mugs.losses.info_nce import info_nce_loss
from mugs.losses.pairs import pair_weights
from mugs.methods.config import MugsConfig
from mugs.methods.network import NetworkOutputs, build_network
from mugs.methods.state import ExtraState, MicroBatchFeatures, gather_features
from mugs.models.flops import copy_to_meta, count_flops


class Mugs:
    """The method as the engine sees it; `mugs.methods.base.Method` explains the calls."""

    def __init__(self, config: MugsConfig, *, seed: int = 0) -> None:
        if min(config.loss_weights) < 0 or sum(config.loss_weights) <= 0:
            raise ValueError(f"loss_weights must be >= 0 and not all 0, got {config.loss_weights}")
        self.config = config
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            self.student = build_network(config, student=True)
            self.teacher = build_network(config, student=False)

        # The teacher starts as a copy of the student. It has no predictors: they exist in the
        # student only.
        shared = {k: v for k, v in self.student.state_dict().items() if ".predictor." not in k}
        self.teacher.load_state_dict(shared)
        self.teacher.requires_grad_(False)

        self.extra_state = ExtraState(config, self.student.backbone.embed_dim, seed)
        # Batch statistics of a micro-batch are not those of the batch.
        self.needs_whole_batch_per_rank = config.head_norm == "batch"
        self.num_depth_branches = (
            2 * self.student.backbone.config.depth if config.drop_path > 0 else 0
        )
        names = ("instance", "local_group", "group")
        self.loss_weights = {n: w for n, w in zip(names, config.loss_weights, strict=True) if w > 0}

    def to(self, device: torch.device) -> "Mugs":
        """Move networks and state to a device."""
        for module in (self.student, self.teacher, self.extra_state):
            module.to(device)
        return self

    def accelerate(self, *, activation_checkpointing: bool = False, compile: bool = False) -> None:
        """Set how the networks run; no number changes beyond rounding.

        Activation checkpointing saves memory in the student's backbone. `compile` compiles the
        blocks of both backbones.
        """
        self.student.backbone.activation_checkpointing = activation_checkpointing
        if compile:
            # In place and block by block: parameter names stay, and all blocks share one compiled
            # graph.
            for network in (self.student, self.teacher):
                for block in network.backbone.blocks:
                    block.compile()

    def count_step_flops(self, recipe: ViewRecipe, num_images: int) -> int:
        """Return the floating-point operations of one step over `num_images` images."""
        twin = copy_to_meta(self, self.student, self.teacher, self.extra_state)
        twin.accelerate(activation_checkpointing=False)
        views = Views(
            torch.empty(4, 1, 3, recipe.large_size, recipe.large_size, device="meta"),
            torch.empty(
                recipe.num_small, 1, 3, recipe.small_size, recipe.small_size, device="meta"
            ),
            torch.ones(1, dtype=torch.bool, device="meta"),
        )

        def total_loss() -> Tensor:
            losses, _ = twin.compute_losses(twin.student, views, epoch=0)
            return torch.stack(list(losses.values())).sum()

        # Every product has the images of the batch as one of its dimensions, so the count is
        # proportional.
        return num_images * count_flops(total_loss)

    def compute_losses(
        self, student: Callable[..., NetworkOutputs], views: Views, epoch: int
    ) -> tuple[dict[str, Tensor], MicroBatchFeatures]:
        """Return the mean losses of a micro-batch by name, with gradient, and its features."""
        config = self.config
        state = self.extra_state
        with torch.no_grad():
            # Crops 0 and 1 are the teacher's own large crops, 2 and 3 the student's.
            teacher: NetworkOutputs = self.teacher([views.large[:2]], state.teacher_memory)
        memory = state.teacher_memory if state.student_memory is None else state.student_memory
        out = student([views.large[2:], views.small], memory)

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
            weak=views.weak,
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
        self._update_center(features, valid)

    def _update_center(self, features: Sequence[MicroBatchFeatures], valid: Tensor) -> None:
        """Move the center towards the mean teacher logits: c <- m c + (1 - m) mean."""
        means = [f.mean_logits for f in features if f.mean_logits is not None]
        if means:
            mean = all_reduce_mean(torch.stack(means).mean(dim=0))
            center = self.extra_state.center
            momentum = self.config.center_momentum
            moved = momentum * center + (1 - momentum) * mean
            center.copy_(torch.where(valid, moved, center))

    @torch.no_grad()
    def update_teacher(self, momentum: float, valid: Tensor) -> None:
        """Update the teacher as the EMA of the student: t <- m t + (1 - m) s, unless not valid.

        Backbone, relation blocks and heads are averaged, the student's predictors have no
        counterpart.
        """
        student = dict(self.student.named_parameters())
        names, averaged = zip(*self.teacher.named_parameters(), strict=True)
        # A step that is not valid has the factors 1 and 0, chosen on the device without a host
        # sync.
        keep = torch.where(valid, momentum, 1.0)
        share = torch.where(valid, 1 - momentum, 0.0)
        torch._foreach_mul_(averaged, keep)
        torch._foreach_add_(
            averaged, torch._foreach_mul([student[name].detach() for name in names], share)
        )

    def set_depth_uniforms(self, uniforms: Tensor | None) -> None:
        """Hand draws (2 * depth, student crops, N) to the student; the teacher drops nothing."""
        self.student.depth_uniforms = uniforms

    def last_layer_parameters(self) -> list[nn.Parameter]:
        """Return the prototypes, which get no update in the first epochs."""
        head = self.student.group_head
        return [] if head is None else list(head.last_layer.parameters())
