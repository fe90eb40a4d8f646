"""All combinations of what release and paper do, on 1, 2 and 4 ranks in 1, 2 and 4 micro-batches,
for ten steps.

The 16 combinations of `make test` hold every three switches in all eight ways; the number of
micro-batches goes round over them, from another start for each number of ranks. `make test-all`
runs all 576 cases.
"""

import itertools
from dataclasses import replace

import pytest
from ranks import spawn
from step_cases import SMALLEST, SWITCHES, Case, Trace, assert_equal, run_naive, run_product

from pipeline.config import load_recipe

MUGS = load_recipe("pretrain/paper")["mugs"]

COMBINATIONS = [
    dict(zip(MUGS, values, strict=True))
    for values in itertools.product(*(SWITCHES[n] for n in MUGS))
]


def is_chosen(index: int) -> bool:
    """Whether the last two switches follow from the others: an orthogonal array of strength 3."""
    a, b, c, d, e, f = (index >> place & 1 for place in range(6))
    return (e, f) == (a ^ b ^ c, b ^ c ^ d)


CHOSEN = list(filter(is_chosen, range(len(COMBINATIONS))))


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


def test_the_chosen_hold_every_three_switches_in_all_ways() -> None:
    assert len(CHOSEN) == 16
    for names in itertools.combinations(MUGS, 3):
        assert len({tuple(COMBINATIONS[index][n] for n in names) for index in CHOSEN}) == 8, names


def compare(_rank: int, cases: list[tuple[Case, Trace]]) -> None:
    for case, trace in cases:
        assert_equal(run_product(case), trace)


@pytest.fixture(scope="module")
def chosen() -> list[tuple[int, Trace]]:
    """What the naive reference makes of the chosen combinations, computed once."""
    return [(index, run_naive(case_of(index))) for index in CHOSEN]


@pytest.mark.slow
@pytest.mark.parametrize("world", [1, 2, 4])
def test_combinations(world: int, chosen: list[tuple[int, Trace]]) -> None:
    cases = [
        (replace(case_of(index), micro_batches=1 << (place + world // 2) % 3), trace)
        for place, (index, trace) in enumerate(chosen)
    ]
    spawn(compare, world, cases)


@pytest.mark.long
@pytest.mark.timeout(3600)
def test_all_combinations() -> None:
    traces = [run_naive(case_of(index)) for index in range(len(COMBINATIONS))]
    for world in (1, 2, 4):
        cases = [
            (replace(case_of(index), micro_batches=micro_batches), trace)
            for index, trace in enumerate(traces)
            for micro_batches in (1, 2, 4)
        ]
        spawn(compare, world, cases)
