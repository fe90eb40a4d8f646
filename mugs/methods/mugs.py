"""Mugs: instance, local-group and group discrimination between a student and its moving average."""

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
    """The method as the engine sees it (`mugs.methods.base.Method`)."""

    def __init__(self, config: MugsConfig, *, seed: int = 0) -> None:
        if min(config.loss_weights) < 0 or sum(config.loss_weights) <= 0:
            raise ValueError(f"loss_weights must be >= 0 and not all 0, got {config.loss_weights}")
        self.config = config
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            self.student = build_network(config, student=True)
            self.teacher = build_network(config, student=False)
        shared = {k: v for k, v in self.student.state_dict().items() if ".predictor." not in k}
        self.teacher.load_state_dict(shared)
        self.teacher.requires_grad_(False)
        self.extra_state = ExtraState(config, self.student.backbone.embed_dim, seed)
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
        """Trade time for memory in the student's backbone; compile the blocks of both backbones in place."""
        self.student.backbone.activation_checkpointing = activation_checkpointing
        if compile:
            for network in (self.student, self.teacher):
                for block in network.backbone.blocks:
                    block.compile()

    def count_step_flops(self, recipe: ViewRecipe, num_images: int) -> int:
        """Return the operations of one step over `num_images` images, by a pass of one image on meta tensors."""
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

        # Every product has the images of the batch as one of its dimensions, so the count is proportional.
        return num_images * count_flops(total_loss)

    def compute_losses(
        self, student: Callable[..., NetworkOutputs], views: Views, epoch: int
    ) -> tuple[dict[str, Tensor], MicroBatchFeatures]:
        """Mean losses of a micro-batch by name, each with gradient, and its features for `refresh`."""
        state, config = self.extra_state, self.config
        with torch.no_grad():
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
                teacher_temperature=self._teacher_temperature(epoch),
            )
        mean_logits = None if teacher.group is None else teacher.group.float().mean(dim=(0, 1))
        features = MicroBatchFeatures(
            teacher.instance,
            teacher.local_group,
            mean_logits,
            out.memory,
            teacher.memory,
            views.weak,
        )
        return losses, features

    def _teacher_temperature(self, epoch: int) -> float:
        start, end = self.config.group_teacher_temperature
        return teacher_temperature_at(
            epoch, start=start, end=end, warmup_epochs=self.config.group_teacher_warmup_epochs
        )

    @torch.no_grad()
    def update_extra_state(self, features: Sequence[MicroBatchFeatures], valid: Tensor) -> None:
        """Queues, memories and centre, from the gathered features of a valid step in global sample order."""
        state, rows_of = self.extra_state, gather_features(features)
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
            if state.student_memory is not None:
                state.student_memory.write(student_rows, accept & rows_of["weak"].bool())
            state.teacher_memory.write(rows_of["teacher_memory"], accept)
            if state.student_memory is None:
                state.teacher_memory.write(student_rows, accept)
        means = [f.mean_logits for f in features if f.mean_logits is not None]
        if means:
            mean = all_reduce_mean(torch.stack(means).mean(dim=0))
            momentum = self.config.center_momentum
            moved = momentum * state.center + (1 - momentum) * mean
            state.center.copy_(torch.where(valid, moved, state.center))

    @torch.no_grad()
    def update_teacher(self, momentum: float, valid: Tensor) -> None:
        """theta' <- m theta' + (1 - m) theta for backbone, relation block and heads, unless the step is not valid."""
        student = dict(self.student.named_parameters())
        names, mine = zip(*self.teacher.named_parameters(), strict=True)
        keep, share = torch.where(valid, momentum, 1.0), torch.where(valid, 1 - momentum, 0.0)
        torch._foreach_mul_(mine, keep)
        torch._foreach_add_(
            mine, torch._foreach_mul([student[name].detach() for name in names], share)
        )

    def set_depth_uniforms(self, uniforms: Tensor | None) -> None:
        """Draws (2 * depth, student crops, N) for the student; the teacher keeps every branch (released)."""
        self.student.depth_uniforms = uniforms

    def last_layer_parameters(self) -> list[nn.Parameter]:
        """The prototypes."""
        head = self.student.group_head
        return [] if head is None else list(head.last_layer.parameters())
