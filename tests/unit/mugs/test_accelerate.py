"""Activation checkpointing and compilation leave every number as it is."""

from dataclasses import replace
from functools import partialmethod

import pytest
import torch
from step_cases import SCHEDULE, SMALLEST, Case, build
from torch import nn
from torch._dynamo.testing import CompileCounter
from torch._dynamo.utils import counters

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


@pytest.mark.parametrize("activation_checkpointing", [False, True])
def test_blocks_compile_to_five_graphs(
    activation_checkpointing: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The student's first block, which drops nothing, and its others, at two sizes of crops; and
    the teacher's, which sees one size. No step after the first adds one, and none breaks.
    """
    counter = CompileCounter()
    monkeypatch.setattr(nn.Module, "compile", partialmethod(nn.Module.compile, backend=counter))
    torch._dynamo.reset()
    counters.clear()
    three_steps(compile=True, activation_checkpointing=activation_checkpointing)
    assert counter.frame_count == 5
    assert not counters["graph_break"]
