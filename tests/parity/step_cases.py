"""Random small configurations of one training step,
run by the product and by the naive reference.
"""

import contextlib
import copy
from collections.abc import Iterator
from dataclasses import dataclass, replace

import torch
from naive_mugs import NaiveMugs
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from mugs import distributed
from mugs.data.loading.batch import Views
from mugs.engine.optim import build_pretrain_adamw
from mugs.methods.config import MugsConfig
from mugs.methods.mugs import Mugs
from mugs.models.config import ViTConfig
from mugs.pretrain.config import StepConfig
from mugs.pretrain.schedule import PretrainSchedule
from mugs.pretrain.step import Trainer, split_micro_batches

SMALLEST = MugsConfig(
    arch=ViTConfig(embed_dim=24, depth=2, num_heads=2, patch_size=8, image_size=32),
    drop_path=0.0,
    head_hidden=16,
    predictor_hidden=20,
    head_out=12,
    group_bottleneck=8,
    num_prototypes=24,
    queue_size=20,
    memory_size=36,
    num_neighbours=3,
    group_teacher_temperature=(0.04, 0.07),
    group_teacher_warmup_epochs=2,
)


@dataclass(frozen=True)
class Case:
    """One configuration: method switches, crops, global batch, micro-batches per rank,
    steps and clipping.
    """

    config: MugsConfig
    num_small: int = 2
    batch: int = 4
    micro_batches: int = 1
    steps: int = 2
    clip: float = 0.0
    seed: int = 0

    def views(self, step: int) -> Views:
        generator = torch.Generator().manual_seed(self.seed * 1000 + step)
        large = torch.randn(4, self.batch, 3, 32, 32, generator=generator)
        small = torch.randn(self.num_small, self.batch, 3, 16, 16, generator=generator)
        return Views(large, small, {"weak": torch.rand(self.batch, generator=generator) < 0.5})


SCHEDULE = PretrainSchedule(
    steps_per_epoch=2,
    epochs=8,
    warmup_epochs=1,
    peak_lr=1e-3,
    min_lr=1e-6,
    weight_decay=0.04,
    weight_decay_end=0.2,
    momentum=0.99,
)


def build(case: Case) -> Mugs:
    """The method with every parameter moved a little, so that biases and norms matter."""
    method = Mugs(case.config, seed=case.seed)
    generator = torch.Generator().manual_seed(case.seed + 7)
    with torch.no_grad():
        for net in (method.student, method.teacher):
            for parameter in net.parameters():
                parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator))
    return method


@dataclass
class Trace:
    """Losses of every step, gradients of the last, and the weights and state after it."""

    losses: list[dict[str, float]]
    gradients: dict[str, Tensor]
    student: dict[str, Tensor]
    teacher: dict[str, Tensor]
    center: Tensor
    pointers: list[int]


def run_product(case: Case) -> Trace:
    """This rank's share of the case through Trainer; losses are means over ranks."""
    method = build(case)
    world, rank = distributed.world_size(), distributed.rank()
    student = method.student if world == 1 else DistributedDataParallel(method.student)
    trainer = Trainer(
        method,
        build_pretrain_adamw(method.student),
        SCHEDULE,
        StepConfig(clip=((0, case.clip),), freeze_prototypes_epochs=0),
        student,
    )
    share, losses = case.batch // world, []
    for step in range(case.steps):
        views, mine = case.views(step), slice(rank * share, (rank + 1) * share)
        local = Views(
            views.large[:, mine], views.small[:, mine], {"weak": views.extras["weak"][mine]}
        )
        result = trainer.step(list(split_micro_batches(local, share // case.micro_batches)), step)
        values = {"total": result.total, **result.losses}
        losses.append({n: distributed.all_reduce_mean(v).item() for n, v in values.items()})
    state = method.extra_state
    memories = [m for m in (state.student_memory, state.teacher_memory) if m is not None]
    return Trace(
        losses,
        {n: p.grad.clone() for n, p in method.student.named_parameters() if p.grad is not None},
        dict(method.student.state_dict()),
        dict(method.teacher.state_dict()),
        state.center,
        [int(m.pointer) for m in memories],
    )


def run_naive(case: Case) -> Trace:
    """The whole case through the naive reference."""
    naive = NaiveMugs(copy.deepcopy(build(case)), clip=case.clip)
    losses = [
        naive.step(
            case.views(step),
            epoch=step // SCHEDULE.steps_per_epoch,
            lr=SCHEDULE.lr(step),
            wd=SCHEDULE.wd(step),
            momentum=SCHEDULE.teacher_momentum(step),
        )
        for step in range(case.steps)
    ]
    return Trace(
        losses,
        {n: p.grad for n, p in naive.student.named_parameters() if p.grad is not None},
        naive.student.state_dict(),
        naive.teacher.state_dict(),
        naive.center,
        [m.pointer for m in naive.memories.values()],
    )


def write_out_attention(*networks: nn.Module) -> None:
    """Make attention write out its matrix, as counters of operations and plain baselines need."""
    for module in (module for network in networks for module in network.modules()):
        if hasattr(module, "fused_attn"):
            module.fused_attn = False


@contextlib.contextmanager
def float64() -> Iterator[None]:
    """Everything in double precision,
    also where the product widens bytes or bfloat16 by `.float()`.
    """
    default, widen = torch.get_default_dtype(), Tensor.float
    torch.set_default_dtype(torch.float64)
    Tensor.float = lambda self: self.to(torch.float64)
    try:
        yield
    finally:
        torch.set_default_dtype(default)
        Tensor.float = widen


def assert_equal(ours: Trace, naive: Trace) -> None:
    """All within 1e-12 in float64, where the largest difference seen in 200 random cases is 7e-15.

    In float32: losses within 5e-6 (of their value where that is above 1), gradients within 1e-6,
    weights and center within 2e-5. A gradient of norm above 1 gets 1e-6 of its norm: without
    clipping, entries reach 23, where the next float32 number is 2e-6 away. (Over 900 random cases:
    5.8e-8 with clipping; without, 1e-5 in a gradient of norm 18; the naive step is as far from its
    own result in float64.) Pointers are equal.
    """
    exact = naive.center.dtype == torch.float64
    of_losses, of_gradients, of_weights = (1e-12, 1e-12, 1e-12) if exact else (5e-6, 1e-6, 2e-5)
    batch_norm = any(".projector.1." in name for name in naive.student)
    if (
        batch_norm and not exact
    ):  # which divides by the small deviations of few rows, their rounding too
        of_losses, of_gradients, of_weights = 100 * of_losses, 100 * of_gradients, 100 * of_weights
    for mine, theirs in zip(ours.losses, naive.losses, strict=True):
        assert mine.keys() == theirs.keys()
        for name, value in theirs.items():
            assert abs(mine[name] - value) < of_losses * max(1.0, abs(value)), (name, mine, theirs)
    assert ours.gradients.keys() == naive.gradients.keys()
    for name, gradient in naive.gradients.items():
        near(name, ours.gradients[name], gradient, of_gradients * max(1.0, gradient.norm().item()))
    for mine, theirs in ((ours.student, naive.student), (ours.teacher, naive.teacher)):
        for name, value in theirs.items():
            keep = has_effect(name, len(value), batch_norm)
            near(name, mine[name][keep], value[keep], of_weights)
    near("center", ours.center, naive.center, of_weights)
    assert ours.pointers == naive.pointers


def has_effect(name: str, rows: int, batch_norm: bool) -> Tensor:
    """Rows of a parameter that change the loss; the gradient of others is rounding noise,
    which Adam scales up.

    Attention does not depend on the key bias,
    batch normalization takes out shifts that all its inputs share.
    """
    if name.endswith("qkv.bias"):
        return torch.arange(rows) // (rows // 3) != 1
    shift = name == "backbone.norm.bias" or name.endswith(("projector.0.bias", "projector.3.bias"))
    return torch.full((rows,), not (batch_norm and shift))


def near(name: str, ours: Tensor, naive: Tensor, atol: float) -> None:
    """Entries differ by at most `atol`."""
    torch.testing.assert_close(ours, naive, atol=atol, rtol=0, msg=lambda m: f"{name}: {m}")


SWITCHES: dict[str, tuple[object, ...]] = {
    "memory_pointer": ("released", "fifo"),
    "memory_start": ("common", "released"),
    "memories": ("released", "shared"),
    "local_group_token": ("released", "paper"),
    "pair_average": ("released", "uniform"),
    "predictor_init": ("released", "0.02"),
    "relation_depth": (1, 2),
    "head_norm": ("none", "batch"),
    "train_prototype_magnitude": (True, False),
    "loss_weights": (
        (1.0, 1.0, 1.0),
        (2.0, 1.0, 0.5),
        (0.0, 1.0, 1.0),
        (1.0, 0.0, 1.0),
        (1.0, 1.0, 0.0),
    ),
    "loss_sum": ("weighted", "released"),
    "local_group_out": (None, 10),
    "local_group_queue_size": (None, 28),
    "norm_before_predictor": (True, False),
}


def random_case(seed: int) -> Case:
    """A case drawn from a seed: every switch, crops, batch, micro-batches and clipping."""
    generator = torch.Generator().manual_seed(seed)

    def pick(options: tuple[object, ...]) -> object:
        return options[int(torch.randint(len(options), (), generator=generator))]

    config = replace(SMALLEST, **{name: pick(options) for name, options in SWITCHES.items()})
    return Case(
        config,
        num_small=pick((0, 1, 3)),
        batch=4,
        micro_batches=pick((1, 2)) if config.head_norm == "none" else 1,
        clip=pick((0.0, 0.05)),
        seed=seed,
    )
