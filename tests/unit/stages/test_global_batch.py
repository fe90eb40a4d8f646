"""A global batch that does not work out is refused when the plan is made, with the arithmetic."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from pipeline import config
from pipeline.plan import build_plan
from pipeline.spec import ConfigError
from stages import STAGES

NAME = "mugs_vit_s16_ep100"


def plan(*overrides: str) -> None:
    build_plan(config.load_reproduction(NAME, STAGES, overrides))


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        (
            ["pretrain.resources.nodes=3"],
            "runs.pretrain: batch_size 512 over 3 x 8 = 24 ranks leaves 21.33 images each; "
            "expected a multiple of 24 (nearest: 504 or 528)",
        ),
        (
            ["pretrain.batch_size=7"],
            "batch_size 7 over 8 ranks leaves 0.88 images each; "
            "expected a multiple of 8 (nearest: 8)",
        ),
        (
            ["pretrain.micro_batch_size=48"],
            "batch_size 512 over 8 ranks leaves 64 images each, which micro_batch_size 48 cuts "
            "into 1.33 passes; expected a divisor of 64 (nearest below: 32)",
        ),
        (
            ["pretrain.micro_batch_size=32", "pretrain.mugs.head_norm=batch"],
            "leaves 64 images each, more than micro_batch_size 32, "
            "and batch normalization needs them in one pass",
        ),
        (
            ["linear.resources.ranks_per_node=3"],
            "runs.linear: batch_size 1024 over 3 ranks leaves 341.33 images each",
        ),
        (["pretrain.micro_batch_size=0"], "greater than 0"),
    ],
)
def test_refused(overrides: list[str], words: str) -> None:
    with pytest.raises(ConfigError) as caught:
        plan(*overrides)
    assert words in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "overrides",
    [
        ["pretrain.resources.nodes=2"],
        ["pretrain.micro_batch_size=32"],
        ["pretrain.micro_batch_size=100"],
        ["pretrain.micro_batch_size=64", "pretrain.mugs.head_norm=batch"],
    ],
)
def test_accepted(overrides: list[str]) -> None:
    plan(*overrides)


def test_exit_code_2(tmp_path: Path) -> None:
    line = [sys.executable, "run_stage.py", "plan", NAME, "--set", "pretrain.resources.nodes=3"]
    env = {**os.environ, "MUGS_RUN_ROOT": str(tmp_path)}
    done = subprocess.run(
        line, env=env, cwd=Path(__file__).parents[3], capture_output=True, text=True
    )
    assert (
        done.returncode == 2 and "21.33 images each" in done.stderr and done.stderr.count("\n") == 1
    )
