"""Every row M1 ... M33 of the list of discrepancies between paper and release: a switch, or a fix under test."""

import re
import subprocess
import sys
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from pydantic import BaseModel, ValidationError
from step_cases import SCHEDULE, SMALLEST, SWITCHES, Case
from torch.utils._python_dispatch import TorchDispatchMode

from mugs.engine.metering import Meter
from mugs.engine.optim import build_adamw
from mugs.engine.step_log import StepLog
from mugs.methods import Mugs
from mugs.pretrain.config import TrainConfig
from mugs.pretrain.step import StepConfig, Trainer
from mugs.pretrain.train import log_settings
from stages.pretrain import MugsOptions, PretrainConfig

ROOT = Path(__file__).resolve().parents[3]


@dataclass(frozen=True)
class Row:
    """What the row says; `field` of the pretraining stage with its values, the default first; names of tests."""

    what: str
    field: str = ""
    values: tuple[Any, ...] = ()
    tests: tuple[str, ...] = ()


NAIVE = "test_each_switch"  # every value of a switch against the naive reference, tests/parity
ROWS = {
    "M1": Row(
        "memory pointer moves on by 2n", "mugs.memory_pointer", ("released", "fifo"), (NAIVE,)
    ),
    "M2": Row("gather all rows, then filter", tests=("test_two_ranks_equal_the_global_batch",)),
    "M3": Row("query and stored token", "mugs.local_group_token", ("released", "paper"), (NAIVE,)),
    "M4": Row("no small crops", tests=("test_no_small_crops",)),
    "M5": Row(
        "weights multiply", "mugs.loss_weights", ((1.0, 1.0, 1.0), (2.0, 1.0, 0.5)), (NAIVE,)
    ),
    "M6": Row(
        "a loss of weight 0", "mugs.loss_weights", ((1.0, 1.0, 1.0), (1.0, 0.0, 1.0)), (NAIVE,)
    ),
    "M7": Row("relation blocks", "mugs.relation_depth", (1, 2), (NAIVE,)),
    "M8": Row("average over pairs", "mugs.pair_average", ("released", "uniform"), (NAIVE,)),
    "M9": Row("memories", "mugs.memories", ("released", "shared"), (NAIVE,)),
    "M10": Row(
        "initialisation of predictors", "mugs.predictor_init", ("released", "0.02"), (NAIVE,)
    ),
    "M11": Row(
        "erasing before normalising",
        "views.erase_before_norm",
        (True, False),
        ("test_erasing_is_normal_and_before_or_after_normalising",),
    ),
    "M12": Row(
        "the share of weak views",
        "views.weak_prob",
        (0.5, 1.0),
        ("test_weak_prob_is_the_share_of_weak_views",),
    ),
    "M13": Row(
        "small crops of weak-only",
        "views.weak_only_small",
        ("weak", "released"),
        ("test_weak_only_copies_the_teacher_crops",),
    ),
    "M14": Row(
        "RandAugment repeats",
        "views.randaugment_replacement",
        (False, True),
        ("test_randaugment_never_repeats_unless_asked",),
    ),
    "M15": Row("draws belong to samples, not ranks", tests=("test_ranks_share_the_global_batch",)),
    "M16": Row(
        "draws do not repeat per worker", tests=("test_batches_do_not_depend_on_threads_or_start",)
    ),
    "M17": Row(
        "resume goes on", tests=("test_resume_is_bitwise_exact", "test_resume_at_every_step")
    ),
    "M18": Row(
        "checkpoints are whole and strict",
        tests=(
            "test_a_bad_checkpoint_is_named_and_the_one_before_it_is_used",
            "test_missing_keys_are_an_error",
        ),
    ),
    "M19": Row(
        "clipping of ViT-L",
        "clip",
        (((0, 3.0),), ((0, 3.0), (101, 0.3))),
        ("test_clip_schedule", "test_recipe"),
    ),
    "M20": Row("batches of ViT-B and ViT-L", tests=("test_recipe",)),
    "M21": Row("batch 1008 of B-400", tests=("test_recipe",)),
    "M22": Row("weight decay of L-250", tests=("test_schedule",)),
    "M23": Row(
        "group_bottleneck is whole",
        "mugs.group_bottleneck",
        (256, 64),
        ("test_widths_are_whole_numbers",),
    ),
    "M24": Row("undefined names", tests=("test_no_name_is_undefined",)),
    "M25": Row(
        "launching",
        tests=("test_mini_on_slurm", "test_meeting_point_falls_back_to_what_slurm_knows"),
    ),
    "M26": Row(
        "other crop sizes",
        "views.large_size",
        (224, 32),
        ("test_memories_fill_at_other_crop_sizes",),
    ),
    "M27": Row("position table resize", tests=("test_step_0_features",)),
    "M28": Row("no waiting for the device", tests=("test_a_step_reads_nothing_back",)),
    "M29": Row(
        "all folders, labels or not",
        tests=("test_imagenet_is_checked_before_anything_is_converted", "test_without_labels"),
    ),
    "M30": Row("released files on current libraries", tests=("test_full_checkpoint",)),
    "M31": Row(
        "pairs of equal index are left out", tests=("test_twelve_steps", "test_the_defaults")
    ),
    "M32": Row("rank 0 writes", tests=("test_only_rank_0_writes",)),
    "M33": Row("start of a memory's tables", "mugs.memory_start", ("common", "released"), (NAIVE,)),
}


def test_no_row_is_forgotten() -> None:
    assert list(ROWS) == [f"M{i}" for i in range(1, 34)]
    assert all(row.field or row.tests for row in ROWS.values())


@pytest.mark.parametrize(
    "row", [pytest.param(row, id=name) for name, row in ROWS.items() if row.field]
)
def test_switch(row: Row) -> None:
    *part, name = row.field.split(".")
    plain = PretrainConfig(epochs=1, batch_size=8)
    model: BaseModel = getattr(plain, part[0]) if part else plain
    assert getattr(model, name) == row.values[0]
    for value in row.values:
        given: Any = {part[0]: {name: value}} if part else {name: value}
        assert PretrainConfig.model_validate({"epochs": 1, "batch_size": 8, **given})
    if NAIVE in row.tests:
        assert set(row.values) <= set(SWITCHES[name])


def test_every_named_test_exists() -> None:
    text = "\n".join(
        path.read_text(encoding="utf-8") for path in (ROOT / "tests").rglob("test_*.py")
    )
    there = set(re.findall(r"^def (test_\w+)\(", text, re.M))
    assert {name for row in ROWS.values() for name in row.tests} <= there


def test_widths_are_whole_numbers() -> None:
    with pytest.raises(ValidationError):
        MugsOptions(group_bottleneck=256.5)  # type: ignore[arg-type]


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
    return Trainer(method, build_adamw(method.student), SCHEDULE, StepConfig(), method.student)


def test_memories_fill_at_other_crop_sizes() -> None:
    method, fresh, case = Mugs(SMALLEST), Mugs(SMALLEST), Case(SMALLEST)
    views = replace(case.views(0), weak=torch.ones(case.batch, dtype=torch.bool))
    assert views.large.shape[-1] == 32
    trainer_of(method).step([views], 0)
    for name in ("student_memory", "teacher_memory"):
        now, before = (getattr(m.extra_state, name).compare for m in (method, fresh))
        assert (now != before).any(dim=1).sum() == case.batch, name


class NothingReadBack(TorchDispatchMode):
    """Fails on operations whose result decides something on the host, for which it would wait on a GPU."""

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
            folder, log_settings(TrainConfig(epochs=1, batch_size=4, base_lr=0.1), SCHEDULE), meter
        )
        log.open(0)
        log.close()
        assert (folder / "metrics.jsonl").exists() is main
