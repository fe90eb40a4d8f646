"""All combinations of what release and paper do, on 1, 2 and 4 ranks in 1, 2 and 4 micro-batches,
for ten steps.

Two ranks take every second and four every fourth combination, the number of micro-batches going
round over them; `make test-all` runs all 576 cases.
"""

import itertools
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from ranks import spawn
from step_cases import SMALLEST, SWITCHES, Case, Trace, assert_equal, run_naive, run_product

from mugs import distributed
from pipeline.config import load_recipe

MUGS = load_recipe("pretrain/paper")["mugs"]

COMBINATIONS = [
    dict(zip(MUGS, values, strict=True))
    for values in itertools.product(*(SWITCHES[n] for n in MUGS))
]


def case_of(index: int) -> Case:
    return Case(
        replace(SMALLEST, **COMBINATIONS[index], queue_size=48),
        batch=16,
        steps=10,
        clip=0.05,
        seed=index,
    )


def test_all_are_there() -> None:
    assert len(COMBINATIONS) == 64
    assert {name: value for name, value in MUGS.items() if value not in SWITCHES[name]} == {}


@pytest.fixture(scope="module")
def expected(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What the naive reference makes of each combination, computed once."""
    path = tmp_path_factory.mktemp("naive") / "traces.pt"
    torch.save([vars(run_naive(case_of(index))) for index in range(len(COMBINATIONS))], path)
    return path


def compare(_rank: int, path: Path, everything: bool) -> None:
    world = distributed.world_size()
    for index, trace in enumerate(torch.load(path, weights_only=True)):
        if (index + index // 8) % world and not everything:
            continue
        for micro_batches in (1, 2, 4) if everything or world == 1 else (1 << index // world % 3,):
            assert_equal(
                run_product(replace(case_of(index), micro_batches=micro_batches)), Trace(**trace)
            )


@pytest.mark.slow
@pytest.mark.parametrize("world", [1, 2, 4])
def test_combinations(world: int, expected: Path) -> None:
    spawn(compare, world, expected, False)


@pytest.mark.long
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("world", [1, 2, 4])
def test_all_combinations(world: int, expected: Path) -> None:
    spawn(compare, world, expected, True)
