"""Golden values of DINO, iBOT and MGC (golden/README.md): inputs, trainer and comparisons."""

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from mugs.data.loading.batch import Views
from mugs.engine.optim import Decay, build_pretrain_adamw
from mugs.methods.base import Method
from mugs.models.config import ViTConfig
from mugs.pretrain.config import StepConfig
from mugs.pretrain.schedule import PretrainSchedule
from mugs.pretrain.step import Trainer, sum_weighted_losses
from mugs.weights.backbone_file import read_released_checkpoint

GOLDEN = Path(__file__).parent / "golden"


@dataclass(frozen=True)
class Golden:
    """What the released code computed for one configuration."""

    config: dict[str, Any]
    steps: list[dict[str, Any]]
    arrays: dict[str, np.ndarray]
    checkpoint: dict[str, Any]

    @property
    def arch(self) -> ViTConfig:
        config = self.config
        return ViTConfig(
            embed_dim=config["embed_dim"], depth=config["depth"], num_heads=config["num_heads"]
        )

    def views(
        self, step: int, extras: dict[str, Tensor], *, num_large: int = 2, blocks: int = 1
    ) -> Views:
        """The images of a step: noise, and colors of each image that all its crops share."""
        config = self.config
        num = config["batch"]
        rng = np.random.default_rng([config["seed"], step])
        side = config["image_size"]
        large = rng.standard_normal((num_large, num, 3, side, side), dtype=np.float32)
        count = config.get("n_local", 0)
        small = rng.standard_normal((count, num, 3, 96, 96), dtype=np.float32)
        colors = 2 * rng.standard_normal((num, 3, blocks, blocks), dtype=np.float32)
        for crops in (large, small):
            crops += colors.repeat(crops.shape[-1] // blocks, -1).repeat(
                crops.shape[-1] // blocks, -2
            )
        return Views(torch.from_numpy(large), torch.from_numpy(small), extras)

    def trainer(self, method: Method, decay: Decay = "matrices") -> Trainer:
        config = self.config
        schedule = PretrainSchedule(
            steps_per_epoch=config["steps_per_epoch"],
            epochs=config["epochs"],
            warmup_epochs=config["warmup_epochs"],
            peak_lr=config["lr_scaled"],
            min_lr=config["min_lr"],
            weight_decay=config["weight_decay"],
            weight_decay_end=config["weight_decay_end"],
            momentum=config["momentum_teacher"],
        )
        step_config = StepConfig(
            clip=((0, config["clip_grad"]),),
            freeze_prototypes_epochs=config.get("freeze_last_layer", 0),
        )
        optimizer = build_pretrain_adamw(method.student, patch_lr_scale=1.0, decay=decay)
        return Trainer(method, optimizer, schedule, step_config, method.student)


def load_golden(name: str) -> Golden:
    record = json.loads((GOLDEN / name / "golden.json").read_text())
    return Golden(
        record["config"],
        record["steps"],
        dict(np.load(GOLDEN / name / "golden.npz")),
        read_released_checkpoint(GOLDEN / name / "init.pth"),
    )


def check_rates(trainer: Trainer, record: dict[str, Any]) -> None:
    """Learning rate, weight decay and momentum of a step."""
    schedule = trainer.schedule
    step = record["step"]
    assert schedule.lr(step) == pytest.approx(record["lr"], rel=1e-12, abs=1e-15)
    assert schedule.wd(step) == pytest.approx(record["wd"], rel=1e-12)
    assert schedule.teacher_momentum(step) == pytest.approx(record["momentum"], rel=1e-12)


def check_norms(
    released: dict[str, dict[str, Tensor]], record: dict[str, Any], skipped: tuple[str, ...] = ()
) -> None:
    """Norms of every parameter of student and teacher, given under their released names.

    The key third of `qkv.bias` has a gradient that is zero but for rounding, which AdamW makes
    steps of: of these, queries and values are compared.
    """
    for who, state in released.items():
        norms = record[f"{who}_norm"]
        tensors = {name.removeprefix("module."): value for name, value in state.items()}
        assert set(norms) - set(tensors) == set()
        for name, expected in norms.items():
            value = tensors[name]
            if name in skipped:
                continue
            if name.endswith("qkv.bias"):
                query, _, values = value.chunk(3)
                value = torch.cat([query, values])
                expected = record["query_value_norm"][who][name]
            assert value.norm().item() == pytest.approx(expected, rel=2e-5), (who, name)


def check_gradient_norms(
    golden: Golden, method: Method, views: Views, rename: Callable[[str], str]
) -> None:
    """Norms of all gradients of step 0 before clipping, to 2e-5 of the largest.

    `rename` gives the released name of a parameter of the student.
    """
    losses, _ = method.compute_losses(method.student, views, 0)
    sum_weighted_losses(losses, method.loss_weights).backward()
    found = {rename(name): norm for name, norm in gradient_norms(method.student).items()}
    expected = golden.steps[0]["grad_norms_before_clip"]
    assert found.keys() == expected.keys()
    largest = max(expected.values())
    for name, norm in found.items():
        assert norm == pytest.approx(expected[name], abs=2e-5 * largest), name


def gradient_norms(network: nn.Module) -> dict[str, float]:
    """Norms of all gradients, by our names of the parameters."""
    return {
        name: parameter.grad.norm().item()
        for name, parameter in network.named_parameters()
        if parameter.grad is not None
    }
