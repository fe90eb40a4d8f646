"""Activation checkpointing and compilation leave every number as it is."""

from dataclasses import replace

import pytest
from step_cases import SCHEDULE, SMALLEST, Case, build

from mugs.engine.optim import build_pretrain_adamw
from mugs.engine.step import StepResult
from mugs.models.stochastic_depth import draw_depth_uniforms
from mugs.pretrain.config import StepConfig
from mugs.pretrain.step import Trainer

CASE = Case(replace(SMALLEST, drop_path=0.4), num_small=3)


def three_steps(**options: bool) -> list[StepResult]:
    method = build(CASE)
    method.accelerate(**options)
    trainer = Trainer(
        method, build_pretrain_adamw(method.student), SCHEDULE, StepConfig(), method.student
    )
    results = []
    for step in (1, 2, 3):
        draws = draw_depth_uniforms(
            0, step, branches=method.num_depth_branches, crops=5, batch_size=CASE.batch
        )
        results.append(trainer.step([CASE.views(step)], step, [draws]))
    return results


def compare(**options: bool) -> None:
    """Losses of the later steps depend on the gradients of the earlier ones."""
    for mine, theirs in zip(three_steps(**options), three_steps(), strict=True):
        for name, value in theirs.losses.items():
            assert abs(mine.losses[name] - value) < 1e-5


def test_activation_checkpointing() -> None:
    compare(activation_checkpointing=True)


@pytest.mark.slow
def test_compile() -> None:
    compare(compile=True)
