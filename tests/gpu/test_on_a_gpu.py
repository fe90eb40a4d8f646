"""On a real GPU: the numbers of the CPU, no wait within a step, and runs that repeat bit by bit."""

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from step_cases import SCHEDULE, SMALLEST, Case
from stopping import StopAfter
from tiny_tasks import TASKS

from mugs.data.views.config import ViewRecipe
from mugs.devices import use_deterministic_algorithms
from mugs.distributed import set_tf32
from mugs.engine.control import StopConsensus
from mugs.engine.optim import build_pretrain_adamw
from mugs.methods.mugs import Mugs
from mugs.pretrain.config import StepConfig, TrainConfig
from mugs.pretrain.step import Trainer
from mugs.pretrain.train import draw_micro_batch_uniforms

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.slow,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU"),
]
CASE = Case(replace(SMALLEST, drop_path=0.4), num_small=3)
CONFIG = TrainConfig(
    epochs=8, batch_size=CASE.batch, base_lr=1e-3, views=ViewRecipe(num_small=CASE.num_small)
)


@pytest.fixture(autouse=True)
def strict_fp32() -> Iterator[None]:
    set_tf32(False)
    yield
    set_tf32(True)


@pytest.mark.parametrize("task", TASKS)
def test_the_numbers_are_those_of_the_cpu(task: str, tmp_path: Path) -> None:
    plain = TASKS[task](torch.device("cpu"), "fp32", tmp_path / "cpu")
    found = TASKS[task](torch.device("cuda", 0), "fp32", tmp_path / "cuda")
    for name, value in plain.items():
        if not name.endswith("qkv.bias"):  # the gradient of a key's bias is rounding noise
            torch.testing.assert_close(found[name], value, rtol=1e-3, atol=1e-3, msg=name)


def train(steps: int) -> dict[str, torch.Tensor]:
    """Train a few steps on the GPU, the later ones with waits forbidden."""
    device = torch.device("cuda", 0)
    method = Mugs(CASE.config).to(device)
    for network in (method.student, method.teacher):
        network.backbone.resize_by_product = True
    trainer = Trainer(
        method, build_pretrain_adamw(method.student), SCHEDULE, StepConfig(), method.student
    )
    for step in range(steps):
        views = CASE.views(step)
        views = replace(
            views,
            large=views.large.to(device),
            small=views.small.to(device),
            extras={name: value.to(device) for name, value in views.extras.items()},
        )
        torch.cuda.set_sync_debug_mode("error" if step > 0 else "default")
        try:
            draws = draw_micro_batch_uniforms(method, CONFIG, step, CASE.batch)
            trainer.step([views], step, draws)
        finally:
            torch.cuda.set_sync_debug_mode("default")
    return {name: value.cpu() for name, value in method.student.state_dict().items()}


def test_a_step_never_waits() -> None:
    train(3)


def test_deterministic_runs_repeat() -> None:
    use_deterministic_algorithms()
    try:
        one, other = train(4), train(4)
    finally:
        torch.use_deterministic_algorithms(False)
    assert [name for name in one if not torch.equal(one[name], other[name])] == []


def test_ranks_agree_to_stop_over_nccl() -> None:
    device = torch.device("cuda", 0)
    dist.init_process_group("nccl", store=dist.HashStore(), rank=0, world_size=1, device_id=device)
    try:
        control = StopAfter(3)
        consensus = StopConsensus(control)
        agreed = []
        for step in range(1, 6):
            control.heartbeat(step)
            agreed.append(consensus.agree_to_stop())
        consensus.close()
    finally:
        dist.destroy_process_group()
    # The answer to step 3 is read after step 4.
    assert agreed == [False, False, False, True, True]
