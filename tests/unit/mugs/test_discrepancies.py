"""Fixes of defects of the release that no other test holds (docs/deviations.md: M23, M24,
M26, M28, M32).
"""

import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from step_cases import SCHEDULE, SMALLEST, Case
from torch.utils._python_dispatch import TorchDispatchMode

from mugs.engine.metering import Meter
from mugs.engine.optim import build_pretrain_adamw
from mugs.engine.step_log import StepLog
from mugs.methods.config import MugsConfig
from mugs.methods.mugs import Mugs
from mugs.models.heads import InfoNCEHead
from mugs.pretrain.config import StepConfig, TrainConfig
from mugs.pretrain.step import Trainer
from mugs.pretrain.train import build_log_settings
from pipeline.reading import validate_model
from pipeline.spec import ConfigError
from stages.finetune import FinetuneStageConfig

ROOT = Path(__file__).resolve().parents[3]


def test_widths_are_whole_numbers() -> None:
    with pytest.raises(ConfigError):
        validate_model(MugsConfig, {"group_bottleneck": 256.5}, "x.yaml")


@pytest.mark.parametrize("norm_before", [True, False])
def test_norms_of_the_student(norm_before: bool) -> None:
    torch.manual_seed(0)
    head = InfoNCEHead(6, hidden=8, out=4, predictor_hidden=10, norm_before_predictor=norm_before)
    teacher = InfoNCEHead(6, hidden=8, out=4, norm_before_predictor=norm_before)
    x = 3 * torch.randn(5, 6)
    assert head.predictor is not None
    inside = head.projector(x)
    if norm_before:
        inside = inside / inside.norm(dim=1, keepdim=True)
    expected = head.predictor(inside)
    torch.testing.assert_close(head(x), expected / expected.norm(dim=1, keepdim=True))
    # The predictor is not linear, so the norm before it makes a difference after it too.
    torch.testing.assert_close(teacher(x).norm(dim=1), torch.ones(5))


@pytest.mark.parametrize(
    "given",
    [{"optimizer": "sgd"}, {"views": {"color_aug": True}}, {"views": {"color_jitter": 0.4}}],
)
def test_options_that_are_not_offered(given: dict[str, Any]) -> None:
    needed = {"epochs": 1, "batch_size": 4, "base_lr": 0.1}
    validate_model(TrainConfig, needed, "x.yaml")
    with pytest.raises(ConfigError, match="unknown"):
        validate_model(TrainConfig, {**needed, **given}, "x.yaml")


@pytest.mark.parametrize(
    "option",
    ["layer_scale", "rel_pos_bias", "color_jitter", "clip", "ema", "images.color_jitter"],
)
def test_options_of_fine_tuning_that_are_not_offered(option: str) -> None:
    needed = {"epochs": 1, "batch_size": 4, "rate": {"base_lr": 0.1}, "layer_decay": 1.0}
    validate_model(FinetuneStageConfig, needed, "x.yaml")
    group, _, key = option.rpartition(".")
    given = {group: {key: 0.4}} if group else {key: 0.4}
    with pytest.raises(ConfigError, match=f"unknown key '{key}'"):
        validate_model(FinetuneStageConfig, {**needed, **given}, "x.yaml")


def test_no_name_is_undefined() -> None:
    packages = ["mugs", "pipeline", "results", "slurm", "stages", "run_stage.py"]
    line = [
        sys.executable,
        "-m",
        "ruff",
        "check",
        "--isolated",
        "--no-cache",
        "--select",
        "F821,F822,F823",
        *packages,
    ]
    done = subprocess.run(line, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr


def trainer_of(method: Mugs) -> Trainer:
    return Trainer(
        method, build_pretrain_adamw(method.student), SCHEDULE, StepConfig(), method.student
    )


def test_memories_fill_at_other_crop_sizes() -> None:
    method, fresh, case = Mugs(SMALLEST), Mugs(SMALLEST), Case(SMALLEST)
    views = replace(case.views(0), extras={"weak": torch.ones(case.batch, dtype=torch.bool)})
    assert views.large.shape[-1] == 32
    trainer_of(method).step([views], 0)
    for name in ("student_memory", "teacher_memory"):
        now, before = (getattr(m.extra_state, name).keys for m in (method, fresh))
        assert (now != before).any(dim=1).sum() == case.batch, name


class NothingReadBack(TorchDispatchMode):
    """Fails on operations whose result decides something on the host,
    for which it would wait on a GPU.
    """

    NAMES = ("_local_scalar_dense", "nonzero", "is_nonzero", "masked_select", "unique", "equal")

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.overloadpacket.__name__
        assert name.split(".")[-1] not in self.NAMES, f"{name} reads from the device"
        return func(*args, **(kwargs or {}))


def test_a_step_reads_nothing_back() -> None:
    with pytest.raises(AssertionError, match="reads from the device"), NothingReadBack():
        torch.ones(()).item()
    method, case = Mugs(SMALLEST), Case(SMALLEST)
    trainer = trainer_of(method)
    trainer.step([case.views(0)], 0)  # the optimizer makes its state
    with NothingReadBack():
        trainer.step([case.views(1)], 1)


def test_only_rank_0_writes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    meter = Meter(torch.device("cpu"), "fp32", flops=1.0)
    for main in (True, False):
        monkeypatch.setattr("mugs.distributed.is_main", lambda main=main: main)
        folder = tmp_path / str(main)
        log = StepLog(
            folder,
            build_log_settings(TrainConfig(epochs=1, batch_size=4, base_lr=0.1), SCHEDULE),
            meter,
        )
        log.open(0)
        log.close()
        assert (folder / "metrics.jsonl").exists() is main
