"""Checkpoints, schedules, exact resume."""

import json
import os
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from step_cases import SMALLEST

from mugs.checkpoint.record import CheckpointError
from mugs.checkpoint.save_load import load_latest, save_checkpoint
from mugs.data.sources.base import FolderSource
from mugs.data.views.config import ViewRecipe
from mugs.engine.optim import build_pretrain_parameter_groups, clip_each_tensor
from mugs.losses.clustering import teacher_temperature_at
from mugs.methods.mugs import Mugs
from mugs.pretrain.config import StepConfig, TrainConfig
from mugs.pretrain.train import pretrain

PARTS = {"a": {"x": torch.arange(5.0)}, "b": {"y": torch.ones(2, 2)}}


@pytest.mark.parametrize("damage", ["cut", "flip", "remove", "json", "link"])
def test_a_bad_checkpoint_is_named_and_the_one_before_it_is_used(
    tmp_path: Path, damage: str, caplog: pytest.LogCaptureFixture
) -> None:
    save_checkpoint(tmp_path, 1, PARTS, {})
    file = save_checkpoint(tmp_path, 2, PARTS, {}) / (
        "state.json" if damage == "json" else "a.safetensors"
    )
    if damage == "remove":
        file.unlink()
    elif damage == "flip":
        content = bytearray(file.read_bytes())
        content[-1] ^= 1
        file.write_bytes(content)
    elif damage == "link":  # to what was written, so that size and SHA-256 fit
        file.symlink_to(file.rename(tmp_path / "elsewhere"))
    else:
        os.truncate(file, file.stat().st_size - 3)
    assert load_latest(tmp_path)[0] == 1
    assert str(file) in caplog.text


@pytest.mark.parametrize(
    ("epoch", "temperature"), [(0, 0.04), (10, 0.04 + 0.03 * 10 / 29), (29, 0.07), (30, 0.07)]
)
def test_teacher_temperature_rises_linearly(epoch: int, temperature: float) -> None:
    found = teacher_temperature_at(epoch, start=0.04, end=0.07, warmup_epochs=30)
    assert found == pytest.approx(temperature)


def test_no_good_checkpoint_is_an_error_not_a_fresh_start(tmp_path: Path) -> None:
    (save_checkpoint(tmp_path, 2, PARTS, {}) / "a.safetensors").unlink()
    with pytest.raises(CheckpointError, match="none of the 1"):
        load_latest(tmp_path)


def test_clipping_is_per_tensor() -> None:
    parameters = [torch.nn.Parameter(torch.zeros(4)) for _ in range(2)]
    parameters[0].grad, parameters[1].grad = torch.full((4,), 5.0), torch.full((4,), 0.1)
    assert clip_each_tensor(parameters, 3.0).tolist() == pytest.approx([10.0, 0.2])
    assert parameters[0].grad.norm().item() == pytest.approx(3.0, rel=1e-5)
    assert parameters[1].grad.norm().item() == pytest.approx(0.2)


def test_parameter_groups_follow_the_recipe() -> None:
    method = Mugs(SMALLEST)
    names = {id(p): n for n, p in method.student.named_parameters()}
    groups = build_pretrain_parameter_groups(method.student, 0.2)
    assert len(groups) == 4
    for group in groups:
        for parameter in group["params"]:
            name = names[id(parameter)]
            assert group["lr_scale"] == (0.2 if "patch_embed" in name else 1.0)
            assert group["decay"] == (not name.endswith("bias") and parameter.ndim > 1)


def test_clip_schedule() -> None:
    config = StepConfig(clip=((0, 3.0), (101, 0.3)))
    assert [config.clip_at(e) for e in (0, 100, 101, 200)] == [3.0, 3.0, 0.3, 0.3]


@pytest.mark.parametrize("drop_path", [0.0, 0.3])
def test_resume_is_bitwise_exact(tmp_path: Path, digits: FolderSource, drop_path: float) -> None:
    torch.set_num_threads(1)
    config = TrainConfig(
        epochs=2,
        batch_size=8,
        base_lr=1e-2,
        warmup_epochs=1,
        steps_per_epoch=3,
        views=ViewRecipe(large_size=32, small_size=16, num_small=2),
        checkpoint_steps=2,
    )
    method_config = replace(SMALLEST, drop_path=drop_path, queue_size=32)

    def train(folder: Path) -> Path:
        pretrain(Mugs(method_config), digits, config, folder, torch.device("cpu"))
        return max((folder / "checkpoints").iterdir())

    straight = json.loads((train(tmp_path / "straight") / "state.json").read_text())
    shutil.rmtree(train(tmp_path / "resumed"))  # as if the run had been killed after step 4
    resumed = json.loads((train(tmp_path / "resumed") / "state.json").read_text())
    assert {"student", "teacher", "optimizer", "extra_state"} == {
        Path(name).stem for name in straight["files"]
    }
    assert resumed["files"] == straight["files"]  # SHA-256 of each
    assert resumed["meta"] == straight["meta"]
