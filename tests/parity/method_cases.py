"""Random small configurations of any method, run by the product and by a naive reference of it.

A naive reference has `student`, `teacher`, `state` (tensors by the names of the product's extra
state) and `step`, which makes one step on the global batch and returns the losses.
"""

import copy
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal, Protocol

import pytest
import torch
from step_cases import SCHEDULE, float64, near
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from mugs import distributed
from mugs.data.loading.batch import Views
from mugs.data.views.config import ViewRecipe
from mugs.engine.optim import Decay, build_pretrain_adamw
from mugs.methods.base import Method
from mugs.methods.config import METHODS
from mugs.methods.options import MethodOptions
from mugs.models.config import ViTConfig
from mugs.pretrain.config import StepConfig, TrainConfig
from mugs.pretrain.step import Trainer, split_micro_batches
from mugs.pretrain.train import draw_micro_batch_uniforms

RANKS = [
    (2, 3, False),
    pytest.param(4, 2, False, marks=pytest.mark.slow),
    pytest.param(2, 12, True, marks=pytest.mark.long),
    pytest.param(4, 12, True, marks=pytest.mark.long),
]
"""Numbers of ranks, and of seeds whose configurations they compare; whether also in float64."""
TINY_VIT = ViTConfig(embed_dim=24, depth=2, num_heads=2, patch_size=8, image_size=32)


def list_seeds(fast: int, slow: int, every: int = 24) -> list[Any]:
    """Return the seeds of random configurations: some fast, some slow, the others long."""
    return [
        *range(fast),
        *(pytest.param(seed, marks=pytest.mark.slow) for seed in range(fast, slow)),
        *(pytest.param(seed, marks=pytest.mark.long) for seed in range(slow, every)),
    ]


class Naive(Protocol):
    student: nn.Module
    teacher: nn.Module
    state: dict[str, Tensor]

    def step(self, views: Views, **rates: Any) -> dict[str, float]: ...


def no_extras(num: int, generator: torch.Generator) -> dict[str, Tensor]:
    return {}


@dataclass(frozen=True)
class MethodCase:
    """One configuration: options, crops, global batch, micro-batches per rank, steps, clipping."""

    options: MethodOptions
    num_large: int = 2
    num_small: int = 2
    batch: int = 4
    micro_batches: int = 1
    steps: int = 3
    clip: float = 0.0
    frozen_epochs: int = 0
    decay: Decay = "matrices"
    precision: Literal["fp32", "bf16"] = "fp32"
    seed: int = 0
    extras: Callable[[int, torch.Generator], dict[str, Tensor]] = no_extras

    def views(self, step: int) -> Views:
        generator = torch.Generator().manual_seed(self.seed * 1000 + step)
        large = torch.randn(self.num_large, self.batch, 3, 32, 32, generator=generator)
        small = torch.randn(self.num_small, self.batch, 3, 16, 16, generator=generator)
        return Views(large, small, self.extras(self.batch, generator))

    def build(self) -> Method:
        """The method with every trained parameter moved a little, so that biases and norms matter.

        The teacher moves elsewhere than the student, and the center away from 0.
        """
        (entry,) = [e for e in METHODS.values() if e.options is type(self.options)]
        method = entry.build(self.options, seed=self.seed)
        generator = torch.Generator().manual_seed(self.seed + 7)
        with torch.no_grad():
            trained = {n for n, p in method.student.named_parameters() if p.requires_grad}
            for network in (method.student, method.teacher):
                for name, parameter in network.named_parameters():
                    if name in trained:
                        parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator))
            for buffer in method.extra_state.buffers():
                if buffer.is_floating_point():
                    buffer.add_(0.1 * torch.randn(buffer.shape, generator=generator))
        return method


@dataclass
class MethodTrace:
    """Losses of every step, gradients of the last, and the weights and state after it."""

    losses: list[dict[str, float]]
    gradients: dict[str, Tensor]
    student: dict[str, Tensor]
    teacher: dict[str, Tensor]
    state: dict[str, Tensor]


def run_method(case: MethodCase) -> MethodTrace:
    """This rank's share of the case through Trainer; losses are means over ranks.

    With stochastic depth, if the options have it.
    """
    method = case.build()
    world, rank = distributed.world_size(), distributed.rank()
    student = method.student if world == 1 else DistributedDataParallel(method.student)
    trainer = Trainer(
        method,
        build_pretrain_adamw(method.student, 1.0, case.decay),
        SCHEDULE,
        StepConfig(
            clip=((0, case.clip),),
            freeze_prototypes_epochs=case.frozen_epochs,
            precision=case.precision,
        ),
        student,
    )
    share = case.batch // world
    micro = share // case.micro_batches
    recipe = ViewRecipe(num_small=case.num_small)
    settings = TrainConfig(
        epochs=SCHEDULE.epochs, base_lr=1e-3, batch_size=case.batch, views=recipe, seed=case.seed
    )
    losses = []
    for step in range(case.steps):
        mine = list(split_micro_batches(case.views(step), share))[rank]
        uniforms = draw_micro_batch_uniforms(method, settings, step, micro)
        result = trainer.step(list(split_micro_batches(mine, micro)), step, uniforms)
        values = {"total": result.total, **result.losses}
        losses.append({n: distributed.all_reduce_mean(v).item() for n, v in values.items()})
    return MethodTrace(
        losses,
        {n: p.grad for n, p in method.student.named_parameters() if p.grad is not None},
        dict(method.student.state_dict()),
        dict(method.teacher.state_dict()),
        dict(method.extra_state.state_dict()),
    )


def run_naive_method(case: MethodCase, naive_of: Callable[[Method, float], Naive]) -> MethodTrace:
    """The whole case through a naive reference."""
    naive = naive_of(copy.deepcopy(case.build()), case.clip)
    losses = [
        naive.step(
            case.views(step),
            epoch=step // SCHEDULE.steps_per_epoch,
            lr=SCHEDULE.lr(step),
            wd=SCHEDULE.wd(step),
            momentum=SCHEDULE.teacher_momentum(step),
            frozen=step // SCHEDULE.steps_per_epoch < case.frozen_epochs,
        )
        for step in range(case.steps)
    ]
    return MethodTrace(
        losses,
        {n: p.grad for n, p in naive.student.named_parameters() if p.grad is not None},
        dict(naive.student.state_dict()),
        dict(naive.teacher.state_dict()),
        naive.state,
    )


def assert_equal_traces(
    ours: MethodTrace,
    naive: MethodTrace,
    *,
    scale: float = 1.0,
    without_effect: Callable[[str], bool] = lambda name: False,
) -> None:
    """In float64 all within 1e-12; in float32 losses within 5e-6, gradients 1e-6, weights 2e-5.

    Each is relative to the value (of a gradient: its norm) where that is above 1. `scale` widens
    the bounds where batch normalization divides by small deviations. `without_effect` names
    parameters whose gradient is nothing but rounding, which AdamW scales up; the keys' third of
    `qkv.bias` is one for every method.
    """
    exact = next(iter(naive.student.values())).dtype == torch.float64
    bounds = (1e-12, 1e-12, 1e-12) if exact else (5e-6, 1e-6, 2e-5)
    of_losses, of_gradients, of_weights = (scale * bound for bound in bounds)
    for mine, theirs in zip(ours.losses, naive.losses, strict=True):
        assert mine.keys() == theirs.keys()
        for name, value in theirs.items():
            assert abs(mine[name] - value) < of_losses * max(1.0, abs(value)), (name, mine, theirs)
    assert ours.gradients.keys() == naive.gradients.keys()
    for name, gradient in naive.gradients.items():
        near(name, ours.gradients[name], gradient, of_gradients * max(1.0, gradient.norm().item()))
    for mine, theirs in ((ours.student, naive.student), (ours.teacher, naive.teacher)):
        assert mine.keys() == theirs.keys()
        for name, value in theirs.items():
            if without_effect(name):
                continue
            keep = torch.ones(len(value), dtype=torch.bool)
            if name.endswith("qkv.bias"):
                keep = torch.arange(len(value)) // (len(value) // 3) != 1
            near(name, mine[name][keep], value[keep], of_weights)
    assert ours.state.keys() == naive.state.keys()
    for name, value in naive.state.items():
        near(name, ours.state[name], value, of_weights)


def compare_with_naive(
    case: MethodCase,
    naive_of: Callable[[Method, float], Naive],
    *,
    exact: bool = True,
    **options: Any,
) -> None:
    """On this rank, in float32, as trained, and if `exact` also in float64."""
    assert_equal_traces(run_method(case), run_naive_method(case, naive_of), **options)
    if exact:
        with float64():
            assert_equal_traces(run_method(case), run_naive_method(case, naive_of), **options)
