"""Mugs: instance, local-group and group discrimination between a student and its moving average."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn

from mugs.backbones.vit import ViTConfig, build_vit
from mugs.engine.distributed import all_gather_rows, all_reduce_mean
from mugs.heads import GroupHead, HeadNorm, InfoNCEHead, PredictorInit
from mugs.losses.clustering import clustering, teacher_temperature_at
from mugs.losses.info_nce import info_nce
from mugs.losses.pairs import PairAverage, pair_weights
from mugs.memory import NeighbourMemory, PointerRule, Queue
from mugs.methods.flops import Sizes, backbone_macs, block_macs, linear_macs
from mugs.methods.network import LocalGroupToken, MugsNetwork, Outputs
from mugs.views import Views


@dataclass(frozen=True, kw_only=True)
class MugsConfig:
    """Everything of the method that shapes numbers. Defaults: the released ViT-S runs, but for `memory_start`.

    loss_weights: of instance, local-group and group loss; 0 leaves out head, queue and memories too (rows M5, M6).
    relation_depth: transformer blocks over a token and its neighbours, 2 in the paper (M7).
    memory_pointer, memory_start: `mugs.memory.NeighbourMemory` (M1, M33).
    memories: "released" has one per network, the student's for weak images only; "shared" one for both (paper, M9).
    local_group_token: `mugs.methods.network.MugsNetwork` (M3). pair_average: `mugs.losses.pairs` (M8).
    predictor_init, head_norm: `mugs.heads.InfoNCEHead` (M10).
    """

    arch: str | ViTConfig = "vit_s16"
    drop_path: float = 0.1
    head_hidden: int = 2048
    predictor_hidden: int = 4096
    head_out: int = 256
    group_bottleneck: int = 256
    num_prototypes: int = 65536
    train_prototype_magnitude: bool = True
    queue_size: int = 65536
    memory_size: int = 65536
    num_neighbours: int = 8
    instance_temperature: float = 0.2
    local_group_temperature: float = 0.2
    group_student_temperature: float = 0.1
    group_teacher_temperature: tuple[float, float] = (0.04, 0.04)
    group_teacher_warmup_epochs: int = 0
    center_momentum: float = 0.9
    loss_weights: tuple[float, float, float] = (1.0, 1.0, 1.0)
    relation_depth: int = 1
    memory_pointer: PointerRule = "released"
    memory_start: Literal["common", "released"] = "common"
    memories: Literal["released", "shared"] = "released"
    local_group_token: LocalGroupToken = "released"
    pair_average: PairAverage = "released"
    predictor_init: PredictorInit = "released"
    head_norm: HeadNorm = "none"


@dataclass(frozen=True)
class Features:
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
    instance_queue: Queue | None
    local_group_queue: Queue | None
    student_memory: NeighbourMemory | None
    teacher_memory: NeighbourMemory | None

    def __init__(self, config: MugsConfig, width: int, seed: int) -> None:
        super().__init__()
        instance, local_group, _ = config.loss_weights
        self.instance_queue = Queue(config.queue_size, config.head_out, seed=seed * 100 + 1) if instance else None
        self.local_group_queue = self.student_memory = self.teacher_memory = None
        if local_group:
            self.local_group_queue = Queue(config.queue_size, config.head_out, seed=seed * 100 + 2)
            self.teacher_memory = self._memory(config, width, seed * 100 + 20)
            if config.memories == "released":
                self.student_memory = self._memory(config, width, seed * 100 + 10)
        self.register_buffer("center", torch.zeros(config.num_prototypes))

    @staticmethod
    def _memory(config: MugsConfig, width: int, seed: int) -> NeighbourMemory:
        return NeighbourMemory(
            config.memory_size,
            width,
            seed=seed,
            pointer_rule=config.memory_pointer,
            common_start=config.memory_start == "common",
        )


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
        self.needs_whole_batch = config.head_norm == "batch"
        self.depth_branches = 2 * self.student.backbone.config.depth if config.drop_path > 0 else 0
        names = ("instance", "local_group", "group")
        self.loss_weights = {n: w for n, w in zip(names, config.loss_weights, strict=True) if w > 0}

    def to(self, device: torch.device) -> "Mugs":
        """Move networks and state to a device."""
        for module in (self.student, self.teacher, self.extra_state):
            module.to(device)
        return self

    def accelerate(self, *, activation_checkpointing: bool = False, compile: bool = False) -> None:
        """Trade time for memory in the student's backbone; compile the blocks of both backbones in place."""
        self.student.backbone.recompute = activation_checkpointing
        if compile:
            for network in (self.student, self.teacher):
                for block in network.backbone.blocks:
                    block.compile()

    def flops(self, sizes: Sizes, images: int) -> float:
        """Operations of one step over `images` images: 3 x student + teacher, searches and queue products."""
        config, vit = self.config, self.student.backbone.config
        student_rows, rows_all = 2 + sizes.num_small, 4 + sizes.num_small
        large, small = (backbone_macs(vit, size) for size in (sizes.large_size, sizes.small_size))

        def heads(network: MugsNetwork) -> int:
            modules = (network.instance_head, network.local_group_head, network.group_head)
            relation = len(network.backbone.relation_blocks) * block_macs(config.num_neighbours + 1, vit.embed_dim)
            return relation + sum(linear_macs(head) for head in modules)

        state = self.extra_state
        queues = sum(q is not None for q in (state.instance_queue, state.local_group_queue))
        search = 0 if state.teacher_memory is None else config.memory_size * vit.embed_dim
        macs = 3 * (2 * large + sizes.num_small * small + student_rows * heads(self.student))
        macs += 2 * (large + heads(self.teacher)) + rows_all * search
        macs += 2 * student_rows * queues * config.queue_size * config.head_out
        return 2.0 * macs * images

    def losses(self, student: Callable[..., Outputs], views: Views, epoch: int) -> tuple[dict[str, Tensor], Features]:
        """Mean losses of a micro-batch by name, each with gradient, and its features for `refresh`."""
        state, config = self.extra_state, self.config
        with torch.no_grad():
            teacher: Outputs = self.teacher([views.large[:2]], state.teacher_memory)
        memory = state.teacher_memory if state.student_memory is None else state.student_memory
        out = student([views.large[2:], views.small], memory)
        weights = pair_weights(2, 2 + len(views.small), 2, config.pair_average, views.large.device)
        losses: dict[str, Tensor] = {}
        for name, queue, temperature in (
            ("instance", state.instance_queue, config.instance_temperature),
            ("local_group", state.local_group_queue, config.local_group_temperature),
        ):
            if queue is not None:
                losses[name] = info_nce(getattr(out, name), getattr(teacher, name), queue.rows, weights, temperature)
        if out.group is not None and teacher.group is not None:
            losses["group"] = clustering(
                out.group,
                teacher.group,
                state.center,
                weights,
                student_temperature=config.group_student_temperature,
                teacher_temperature=self._teacher_temperature(epoch),
            )
        mean_logits = None if teacher.group is None else teacher.group.float().mean(dim=(0, 1))
        features = Features(teacher.instance, teacher.local_group, mean_logits, out.memory, teacher.memory, views.weak)
        return losses, features

    def _teacher_temperature(self, epoch: int) -> float:
        start, end = self.config.group_teacher_temperature
        return teacher_temperature_at(
            epoch, start=start, end=end, warmup_epochs=self.config.group_teacher_warmup_epochs
        )

    @torch.no_grad()
    def refresh(self, features: Sequence[Features], valid: Tensor) -> None:
        """Queues, memories and centre, from the gathered features of a valid step in global sample order."""
        state, rows_of = self.extra_state, gather(features)
        for queue, field in ((state.instance_queue, "instance"), (state.local_group_queue, "local_group")):
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
        torch._foreach_add_(mine, torch._foreach_mul([student[name].detach() for name in names], share))

    def set_depth_uniforms(self, uniforms: Tensor | None) -> None:
        """Draws (2 * depth, student crops, N) for the student; the teacher keeps every branch (released)."""
        self.student.depth_uniforms = uniforms

    def last_layer_parameters(self) -> list[nn.Parameter]:
        """The prototypes."""
        head = self.student.group_head
        return [] if head is None else list(head.last_layer.parameters())


def gather(features: Sequence[Features]) -> dict[str, Tensor]:
    """Rows (B, ...) of the global batch in sample order, for every field there is: one all-gather for all of them."""
    local = {}
    for name in ("instance", "local_group", "student_memory", "teacher_memory", "weak"):
        parts = [getattr(f, name) for f in features]
        if parts[0] is not None:
            images_first = [part.movedim(1, 0) if part.ndim == 3 else part for part in parts]
            local[name] = torch.cat(images_first).float()
    packed = torch.cat([value.flatten(1) if value.ndim > 1 else value[:, None] for value in local.values()], dim=1)
    widths = [value[0].numel() for value in local.values()]
    columns = torch.split(all_gather_rows(packed), widths, dim=1)
    return {n: c.reshape(-1, *value.shape[1:]) for (n, value), c in zip(local.items(), columns, strict=True)}


def build_network(config: MugsConfig, *, student: bool) -> MugsNetwork:
    """Student (with predictors and stochastic depth) or teacher network."""
    instance, local_group, group = config.loss_weights
    backbone = build_vit(
        config.arch,
        relation_depth=config.relation_depth if local_group else 0,
        drop_path=config.drop_path if student else 0.0,
    )

    def info_nce_head() -> InfoNCEHead:
        return InfoNCEHead(
            backbone.embed_dim,
            hidden=config.head_hidden,
            out=config.head_out,
            predictor_hidden=config.predictor_hidden if student else None,
            predictor_init=config.predictor_init,
            norm=config.head_norm,
        )

    group_head = GroupHead(
        backbone.embed_dim,
        hidden=config.head_hidden,
        bottleneck=config.group_bottleneck,
        out=config.num_prototypes,
        train_magnitude=config.train_prototype_magnitude,
        norm=config.head_norm,
    )
    return MugsNetwork(
        backbone,
        info_nce_head() if instance else None,
        info_nce_head() if local_group else None,
        group_head if group else None,
        num_neighbours=config.num_neighbours,
        local_group_token=config.local_group_token,
    )
