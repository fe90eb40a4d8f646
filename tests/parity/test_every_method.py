"""What every method holds. With stochastic depth, ranks and micro-batches drop the branches that
one pass over the global batch drops, and a network that does not take its draws is named. In bf16 a
step is near that in fp32.
"""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from method_cases import TINY_VIT, MethodCase, MethodTrace, assert_equal_traces, run_method
from ranks import spawn
from step_cases import SMALLEST, float64
from torch import Tensor

from mugs.methods.base import Network
from mugs.methods.config import METHODS, DinoConfig, IbotConfig, MgcConfig


def draw_extras(num: int, generator: torch.Generator) -> dict[str, Tensor]:
    """Everything that one of the methods draws of an image besides its views."""
    corners = torch.randint(0, 30, (num, 2, 2), generator=generator)
    sizes = torch.randint(40, 90, (num, 2, 2), generator=generator)
    return {
        "weak": torch.rand(num, generator=generator) < 0.5,
        "masks": torch.rand(num, 2, 4, 4, generator=generator) < 0.2,
        "boxes": torch.cat([corners, sizes], dim=-1),
        "flips": torch.rand(num, 2, generator=generator) < 0.5,
    }


def make_case(**options: object) -> MethodCase:
    return MethodCase(batch=8, clip=0.05, extras=draw_extras, **options)


HEAD = {"arch": TINY_VIT, "head_hidden": 16, "bottleneck": 8, "num_prototypes": 24}
CASES = {
    "mugs": make_case(options=replace(SMALLEST, drop_path=0.4, queue_size=32), num_large=4),
    "dino": make_case(options=DinoConfig(drop_path=0.4, **HEAD)),
    "ibot": make_case(
        options=IbotConfig(drop_path=0.4, clustering_input="unmasked", **HEAD), num_large=4
    ),
    "mgc": make_case(
        options=MgcConfig(
            arch=replace(TINY_VIT, positions="sincos"),
            drop_path=0.4,
            head_hidden=16,
            head_out=8,
            windows=(1, 2, 4),
        ),
        num_small=0,
        decay="all",
    ),
}


def test_every_method_is_here() -> None:
    assert CASES.keys() == METHODS.keys()


@pytest.fixture(scope="module")
def expected(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What one pass over the global batch makes of each case, in float64."""
    path = tmp_path_factory.mktemp("whole") / "traces.pt"
    with float64():
        torch.save({name: vars(run_method(case)) for name, case in CASES.items()}, path)
    return path


def compare(_rank: int, path: Path, micro_batches: int) -> None:
    for name, whole in torch.load(path, weights_only=True).items():
        case = CASES[name]
        parts = micro_batches
        if case.options.needs_whole_batch_per_rank:
            if not dist.is_initialized():
                continue  # one rank and one micro-batch: what was computed before
            parts = 1
        with float64():
            ours = run_method(replace(case, micro_batches=parts))
        assert_equal_traces(
            ours, MethodTrace(**whole), scale=100, without_effect=has_no_effect(case)
        )


def has_no_effect(case: MethodCase) -> Callable[[str], bool]:
    """Return whether a batch normalization takes out what a parameter does."""
    normalized = case.options.needs_whole_batch_per_rank
    return lambda name: normalized and name == "backbone.norm.bias"


@pytest.mark.parametrize(
    ("world", "micro_batches"),
    [
        (1, 2),
        pytest.param(2, 2, marks=pytest.mark.slow),
        pytest.param(4, 1, marks=pytest.mark.long),
    ],
)
def test_the_same_branches_are_dropped(world: int, micro_batches: int, expected: Path) -> None:
    if world == 1:
        compare(0, expected, micro_batches)
    else:
        spawn(compare, world, expected, micro_batches)


def test_dropping_has_an_effect(expected: Path) -> None:
    for name, whole in torch.load(expected, weights_only=True).items():
        case = CASES[name]
        with float64():
            kept = run_method(replace(case, options=replace(case.options, drop_path=0.0)))
        assert kept.losses != whole["losses"], name


@pytest.mark.parametrize("name", METHODS)
def test_draws_that_a_network_does_not_take_are_named(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Network, "set_crop_uniforms", lambda *_: None)
    with pytest.raises(RuntimeError, match=r"drawn for \d crops .* took the draws of 0; call"):
        run_method(CASES[name])


@pytest.mark.parametrize("name", METHODS)
def test_bf16_is_near_fp32(name: str) -> None:
    """The losses of one step; gradients and weights stay in fp32."""
    case = replace(CASES[name], steps=1)
    exact = run_method(case)
    rough = run_method(replace(case, precision="bf16"))
    for loss, value in exact.losses[0].items():
        assert rough.losses[0][loss] == pytest.approx(value, rel=0.05), loss
    assert rough.losses != exact.losses
    for gradient in rough.gradients.values():
        assert gradient.dtype == torch.float32 and gradient.isfinite().all()
    assert {value.dtype for value in rough.teacher.values()} == {torch.float32}
