"""The released code's numbers on a tiny model (golden/README.md), through the public API."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from mugs.data.loading.batch import Views
from mugs.engine.optim import build_pretrain_adamw
from mugs.methods.config import MugsConfig
from mugs.methods.mugs import Mugs
from mugs.models.config import ViTConfig
from mugs.pretrain.config import StepConfig
from mugs.pretrain.schedule import PretrainSchedule
from mugs.pretrain.step import Trainer
from mugs.weights.pickle_file import read_released_checkpoint

GOLDEN = Path(__file__).parent / "golden"
RELEASED = {"instance": "instance-sup.", "local_group": "local-group-sup.", "group": "group-sup."}


def load_full_state(method: Mugs, checkpoint: dict[str, Any]) -> None:
    """Networks, queues, memories and center of a released full checkpoint, strictly.

    A released memory holds three tables: the first has the keys, the second the values,
    the third is unused.
    """
    method.student.load_state_dict(
        {k.removeprefix("module."): v for k, v in checkpoint["student"].items()}
    )
    method.teacher.load_state_dict(checkpoint["teacher"])
    state = method.extra_state
    extra = {"center": checkpoint["group-sup."]["center"][0]}
    for ours, theirs in (
        ("instance_queue", "instance-sup."),
        ("local_group_queue", "local-group-sup."),
    ):
        extra[f"{ours}.rows"] = checkpoint[theirs]["queue"].T
        extra[f"{ours}.pointer"] = checkpoint[theirs]["queue_ptr"][0]
    for ours, theirs in (("student_memory", "student_mem"), ("teacher_memory", "teacher_mem")):
        extra[f"{ours}.keys"] = checkpoint[theirs]["block.queue_q"]
        if f"{ours}.values" in state.state_dict():
            extra[f"{ours}.values"] = checkpoint[theirs]["block.queue_k"]
        extra[f"{ours}.pointer"] = checkpoint[theirs]["block.queue_ptr"][0]
    state.load_state_dict(extra)


@pytest.fixture
def golden() -> dict[str, Any]:
    record: dict[str, Any] = json.loads((GOLDEN / "golden.json").read_text())
    record["arrays"] = dict(np.load(GOLDEN / "golden.npz"))
    return record


@pytest.fixture
def method() -> Mugs:
    config = MugsConfig(
        arch=ViTConfig(embed_dim=48, depth=3, num_heads=3),
        drop_path=0.0,
        head_hidden=64,
        predictor_hidden=80,
        head_out=32,
        group_bottleneck=24,
        num_prototypes=96,
        queue_size=20,
        memory_size=36,
        group_teacher_temperature=(0.04, 0.07),
        group_teacher_warmup_epochs=2,
        memory_start="released",
    )
    mugs = Mugs(config)
    load_full_state(mugs, read_released_checkpoint(GOLDEN / "init.pth"))
    return mugs


def inputs(config: dict[str, Any], step: int) -> Views:
    rng = np.random.default_rng([config["seed"], step])
    num = config["batch"]
    large = rng.standard_normal((4, num, 3, 224, 224), dtype=np.float32)
    small = rng.standard_normal((config["n_local"], num, 3, 96, 96), dtype=np.float32)
    return Views(
        torch.from_numpy(large),
        torch.from_numpy(small),
        {"weak": torch.from_numpy(rng.random(num) < 0.6)},
    )


def test_step_0_features(golden: dict[str, Any], method: Mugs) -> None:
    views, state = inputs(golden["config"], 0), method.extra_state
    with torch.no_grad():
        outputs = {
            "student": method.student([views.large[2:], views.small], state.student_memory),
            "teacher": method.teacher([views.large[:2]], state.teacher_memory),
        }
    for who, out in outputs.items():
        for name in RELEASED:
            expected = golden["arrays"][f"step0/{who}/{name}"]
            np.testing.assert_allclose(
                getattr(out, name).flatten(0, 1), expected, atol=1e-5, rtol=0
            )
        expected = golden["arrays"][f"step0/{who}/memory"][: golden["config"]["batch"]]
        np.testing.assert_allclose(out.memory, expected, atol=1e-5, rtol=0)


def test_twelve_steps(golden: dict[str, Any], method: Mugs) -> None:
    config = golden["config"]
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
        clip=((0, config["clip_grad"]),), freeze_prototypes_epochs=config["freeze_last_layer"]
    )
    trainer = Trainer(
        method, build_pretrain_adamw(method.student), schedule, step_config, method.student
    )
    for record in golden["steps"]:
        step = record["step"]
        assert schedule.lr(step) == pytest.approx(record["lr"], rel=1e-12, abs=1e-15)
        assert schedule.wd(step) == pytest.approx(record["wd"], rel=1e-12)
        assert schedule.teacher_momentum(step) == pytest.approx(record["momentum"], rel=1e-12)
        result = trainer.step([inputs(config, step)], step)
        assert result.total.item() == pytest.approx(record["total"], abs=5e-6)
        for name, released in RELEASED.items():
            assert result.losses[name].item() == pytest.approx(record["losses"][released], abs=5e-6)
        check_norms(method, record)
        check_pointers(method, record)
    check_final_state(method, golden["arrays"])


def check_norms(method: Mugs, record: dict[str, Any]) -> None:
    for who in ("student", "teacher"):
        norms = {n: p.norm().item() for n, p in getattr(method, who).named_parameters()}
        expected = {n.removeprefix("module."): v for n, v in record[f"{who}_norm"].items()}
        assert norms.keys() == expected.keys()
        for name, value in expected.items():
            assert norms[name] == pytest.approx(value, rel=2e-5), (who, name, record["step"])


def check_pointers(method: Mugs, record: dict[str, Any]) -> None:
    state = method.extra_state
    assert [int(state.instance_queue.pointer), int(state.local_group_queue.pointer)] == record[
        "queue_ptr"
    ]
    assert [int(state.student_memory.pointer), int(state.teacher_memory.pointer)] == record[
        "memory_ptr"
    ]


def check_final_state(method: Mugs, arrays: dict[str, np.ndarray]) -> None:
    state = method.extra_state
    for ours, released in (
        (state.center, arrays["center"][0]),
        (state.instance_queue.rows.T, arrays["queue/instance-sup."]),
        (state.local_group_queue.rows.T, arrays["queue/local-group-sup."]),
        (state.student_memory.values, arrays["memory/student"]),
        (state.teacher_memory.values, arrays["memory/teacher"]),
    ):
        np.testing.assert_allclose(ours, released, atol=1e-5, rtol=0)
