"""A pretraining of each method, stopped after every one of its steps, ends with the bits of one
that ran through: weights of both networks, optimizer and the state of the method.
"""

from dataclasses import replace
from pathlib import Path
from typing import Any

import campaign_interruptions
import pytest
import torch
from safetensors.torch import load_file
from stopping import StopAfter, StoppedError

from mugs.data.mini.digits import materialize_digits
from mugs.data.sources.folder import FolderSource
from mugs.methods.config import METHODS
from mugs.pretrain.train import pretrain
from stages.pretrain import PretrainConfig

# Two epochs of two steps: a stop within an epoch, at its end, and before the last step.
STEPS = 4
SETS = ("epochs=2", "steps_per_epoch=2", "warmup_epochs=1", "batch_size=4", "checkpoint_steps=100")


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> FolderSource:
    folder = tmp_path_factory.mktemp("data") / "digits"
    materialize_digits(folder)
    return FolderSource(folder / "train")


def plan_pretraining(method: str) -> PretrainConfig:
    run, _ = campaign_interruptions.plan_pretraining(method, SETS)
    assert isinstance(run.config, PretrainConfig)
    return run.config


def train(cfg: PretrainConfig, source: FolderSource, folder: Path, control: Any = None) -> None:
    method = METHODS[cfg.method].build(replace(cfg.options, arch=cfg.arch), seed=cfg.seed)
    pretrain(method, source, cfg, folder, torch.device("cpu"), control)


def read_end(folder: Path) -> dict[str, torch.Tensor]:
    """Every tensor of the last checkpoint, by file and name."""
    last = folder / "checkpoints" / f"step_{STEPS:08d}"
    return {
        f"{path.name}/{name}": value
        for path in sorted(last.glob("*.safetensors"))
        for name, value in load_file(path).items()
    }


@pytest.mark.slow
@pytest.mark.parametrize("method", METHODS)
def test_resume_after_every_step_is_bitwise(
    method: str, source: FolderSource, tmp_path: Path
) -> None:
    cfg = plan_pretraining(method)
    train(cfg, source, tmp_path / "straight")
    expected = read_end(tmp_path / "straight")
    assert {name.partition(".")[0] for name in expected} >= {"student", "teacher", "optimizer"}
    folder = tmp_path / "stopped"
    for stop in range(1, STEPS):
        with pytest.raises(StoppedError):
            train(cfg, source, folder, StopAfter(stop))
    train(cfg, source, folder)
    found = read_end(folder)
    assert found.keys() == expected.keys()
    assert [name for name in found if not torch.equal(found[name], expected[name])] == []
