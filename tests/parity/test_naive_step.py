"""The batched step equals the loop-by-loop reference,
for random configurations and one and two ranks.
"""

from dataclasses import replace

import pytest
from method_cases import list_seeds
from ranks import spawn
from step_cases import (
    SMALLEST,
    SWITCHES,
    Case,
    Trace,
    assert_equal,
    float64,
    random_case,
    run_naive,
    run_product,
)


def compare(case: Case) -> None:
    """In float32, as trained, and in float64,
    where nothing but a difference in what is computed is left.
    """
    assert_equal(run_product(case), run_naive(case))
    with float64():
        assert_equal(run_product(case), run_naive(case))


@pytest.mark.parametrize(
    ("switch", "value"), [(n, v) for n, options in SWITCHES.items() for v in options[1:]]
)
def test_each_switch(switch: str, value: object) -> None:
    compare(Case(replace(SMALLEST, **{switch: value}), clip=0.05))


@pytest.mark.parametrize(
    "switch", [n for n in SWITCHES if n not in ("memory_pointer", "train_prototype_magnitude")]
)
def test_a_switch_changes_the_result(switch: str) -> None:
    """No switch is accepted and ignored;
    the two that are left out show later and in the weights.
    """
    # At equal weights it makes no difference whether they multiply.
    base = replace(SMALLEST, loss_weights=(2.0, 1.0, 1.0)) if switch == "loss_sum" else SMALLEST
    one, other = (
        run_product(Case(replace(base, **{switch: v}), steps=3)).losses
        for v in SWITCHES[switch][:2]
    )
    assert one != other


@pytest.mark.parametrize("weights", [(2.0, 1.0, 0.5), (0.0, 1.0, 3.0)])
def test_released_weights_only_divide(weights: tuple[float, float, float]) -> None:
    config = replace(SMALLEST, loss_weights=weights, loss_sum="released")
    compare(Case(config, clip=0.05))
    (step,) = run_product(Case(config, steps=1)).losses
    total = step.pop("total")
    assert total == pytest.approx(sum(step.values()) / sum(weights), rel=1e-6)


@pytest.mark.parametrize("seed", list_seeds(2, 6))
def test_random_configurations(seed: int) -> None:
    compare(random_case(seed))


def test_no_small_crops() -> None:
    compare(Case(SMALLEST, num_small=0))


def test_the_defaults() -> None:
    compare(Case(SMALLEST, clip=0.05))


def on_rank(_rank: int, traces: list[Trace]) -> None:
    for seed, naive in enumerate(traces):
        assert_equal(run_product(random_case(seed)), naive)


@pytest.mark.parametrize(
    "seeds",
    [pytest.param(3, marks=pytest.mark.slow), pytest.param(12, marks=pytest.mark.long)],
)
def test_two_ranks_equal_the_global_batch(seeds: int) -> None:
    spawn(on_rank, 2, [run_naive(random_case(seed)) for seed in range(seeds)])
