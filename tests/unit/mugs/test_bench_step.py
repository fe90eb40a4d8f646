"""The released step that benchmarks compare with computes what ours does."""

from dataclasses import replace

import pytest
import torch
from release_step import ProductRecorder, ReleasedStep, time_products
from step_cases import SCHEDULE, SMALLEST, Case, build, run_product


@pytest.mark.parametrize("memory_start", ["common", "released"])
def test_the_released_step_gives_the_same_numbers(memory_start: str) -> None:
    case = Case(replace(SMALLEST, memory_start=memory_start), clip=0.05, steps=4)
    ours, released = run_product(case), ReleasedStep(build(case), clip=case.clip)
    for step, expected in enumerate(ours.losses):
        found = released.step(
            case.views(step),
            epoch=step // SCHEDULE.steps_per_epoch,
            lr=SCHEDULE.lr(step),
            wd=SCHEDULE.wd(step),
            momentum=SCHEDULE.teacher_momentum(step),
        )
        assert found == pytest.approx(expected, abs=5e-6)
    torch.testing.assert_close(released.center, ours.center, atol=2e-5, rtol=0)
    assert [m.pointer for m in released.stores.values()] == ours.pointers


def test_products_of_a_step_are_found() -> None:
    layer = torch.nn.Linear(6, 4)
    convolution = torch.nn.Conv2d(3, 5, kernel_size=8, stride=8)
    x = torch.randn(2, 3, 7, 6, requires_grad=True)

    def step() -> None:
        out = torch.nn.functional.scaled_dot_product_attention(x, x, x)
        (layer(out.flatten(0, 2)).sum() + convolution(torch.randn(2, 3, 16, 16)).sum()).backward()

    with ProductRecorder() as recorder:
        step()
    of_attention = {shapes: n for (kind, shapes, _), n in recorder.found.items() if kind == "bmm"}
    assert of_attention == {((6, 7, 6), (6, 6, 7)): 3, ((6, 7, 7), (6, 7, 6)): 3}
    others = {shapes: n for (kind, shapes, _), n in recorder.found.items() if kind == "mm"}
    assert others[(42, 6), (6, 4)] == 1 and others[(8, 192), (192, 5)] == 1
    assert others[(192, 8), (8, 5)] == 1 and sum(others.values()) == 5
    assert time_products(step) > 0
