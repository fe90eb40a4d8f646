"""DINO's step equals a loop-by-loop reference, on one, two and four ranks, in micro-batches."""

from dataclasses import replace

import pytest
import torch
from method_cases import RANKS, TINY_VIT, MethodCase, compare_with_naive, list_seeds, run_method
from naive_dino import NaiveDino
from ranks import spawn

from mugs.methods.config import DinoConfig

SMALLEST = DinoConfig(
    arch=TINY_VIT,
    drop_path=0.0,
    head_hidden=16,
    bottleneck=8,
    num_prototypes=24,
    teacher_temperature=(0.04, 0.07),
    teacher_warmup_epochs=2,
)
SWITCHES: dict[str, tuple[object, ...]] = {
    "train_prototype_magnitude": (False, True),
    "head_norm": ("none", "batch"),
    "student_temperature": (0.1, 0.2),
    "center_momentum": (0.9, 0.5),
    "teacher_warmup_epochs": (2, 0),
}


def without_effect(name: str) -> bool:
    """Shifts that all rows of a batch normalization share, which it takes out."""
    return name == "backbone.norm.bias" or name.endswith(("projector.0.bias", "projector.3.bias"))


def compare(case: MethodCase, exact: bool = True) -> None:
    batch_norm = case.options.head_norm == "batch"
    options = {"scale": 100, "without_effect": without_effect} if batch_norm else {}
    compare_with_naive(case, NaiveDino, exact=exact, **options)


def random_case(seed: int) -> MethodCase:
    """A case drawn from a seed: every switch, crops, micro-batches, clipping and freezing."""
    generator = torch.Generator().manual_seed(seed)

    def pick(options: tuple[object, ...]) -> object:
        return options[int(torch.randint(len(options), (), generator=generator))]

    config = replace(SMALLEST, **{name: pick(values) for name, values in SWITCHES.items()})
    return MethodCase(
        config,
        num_large=pick((2, 4)),
        num_small=pick((0, 1, 3)),
        micro_batches=pick((1, 2)) if config.head_norm == "none" else 1,
        batch=8,
        clip=pick((0.0, 0.05)),
        frozen_epochs=pick((0, 1)),
        seed=seed,
    )


@pytest.mark.parametrize(
    ("switch", "value"), [(name, values[1]) for name, values in SWITCHES.items()]
)
def test_each_switch(switch: str, value: object) -> None:
    case = MethodCase(SMALLEST, clip=0.05)
    other = replace(case, options=replace(SMALLEST, **{switch: value}))
    compare(other)
    one, two = run_method(case), run_method(other)
    magnitude = "head.last_layer.weight_g"
    same = one.losses == two.losses and torch.equal(one.student[magnitude], two.student[magnitude])
    assert not same, "the switch is accepted and ignored"


@pytest.mark.parametrize("seed", list_seeds(4, 8))
def test_random_configurations(seed: int) -> None:
    compare(random_case(seed))


def on_rank(_rank: int, seeds: int, exact: bool) -> None:
    for seed in range(seeds):
        compare(random_case(seed), exact)


@pytest.mark.parametrize(("world", "seeds", "exact"), RANKS)
def test_ranks_equal_the_global_batch(world: int, seeds: int, exact: bool) -> None:
    spawn(on_rank, world, seeds, exact)
