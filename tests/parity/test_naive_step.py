"""The batched step equals the loop-by-loop reference, for random configurations and one and two ranks."""

import socket
from dataclasses import replace

import pytest
import torch.multiprocessing as mp
from hypothesis import given, settings
from hypothesis import strategies as st
from step_cases import (
    SMALLEST,
    SWITCHES,
    Case,
    assert_equal,
    compare_on_rank,
    random_case,
    run_naive,
    run_product,
)


@pytest.mark.parametrize(("switch", "value"), [(n, v) for n, options in SWITCHES.items() for v in options])
def test_each_switch(switch: str, value: object) -> None:
    case = Case(replace(SMALLEST, **{switch: value}), clip=0.05)
    assert_equal(run_product(case), run_naive(case))


@pytest.mark.parametrize("switch", [n for n in SWITCHES if n != "memory_pointer"])
def test_a_switch_changes_the_result(switch: str) -> None:
    """No switch is accepted and ignored."""
    one, other = (run_product(Case(replace(SMALLEST, **{switch: v}), steps=3)).losses for v in SWITCHES[switch][:2])
    if switch == "train_prototype_magnitude":
        pytest.skip("shows in the weights, see test_each_switch")
    assert one != other


@settings(max_examples=15, deadline=None)
@given(seed=st.integers(0, 10**6))
def test_random_configurations(seed: int) -> None:
    case = random_case(seed)
    assert_equal(run_product(case), run_naive(case))


def test_no_small_crops() -> None:
    case = Case(SMALLEST, num_small=0)
    assert_equal(run_product(case), run_naive(case))


def test_two_ranks_equal_the_global_batch() -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
    mp.spawn(compare_on_rank, args=(2, port, list(range(8))), nprocs=2)
