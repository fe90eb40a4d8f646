"""Whole tasks on tensors that claim to be on a GPU: no device is mixed, and no step waits.

Real values, which the CPU computes; see `pretend_cuda.py`. Streams, NCCL and the limits of kernels
are not seen here: for them there are the tests marked `gpu`.
"""

import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

HERE = Path(__file__).resolve().parent
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(
        shutil.which("g++") is None or torch.version.cuda is None,
        reason="needs g++ and a CUDA build of torch",
    ),
]


def run_cases(folder: Path, *cases: str) -> dict[str, Any]:
    command = [sys.executable, str(HERE / "pretend_run.py"), str(folder), *cases]
    done = subprocess.run(command, capture_output=True, text=True, timeout=500, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found


def test_a_step_launches_little_and_never_waits(tmp_path: Path) -> None:
    """Of the depths of ViT-S and B, and of L, with erasing; width and images change no number.

    The widest tensors of a real step split into blocks, of which a GPU has one for 64 images.
    """
    bounds = {"step:12:fp32": 2000, "step:24:fp32": 3200}
    for case, found in run_cases(tmp_path, *bounds).items():
        assert found["waits"] == {}
        assert found["launches"] <= bounds[case], found["most"]


TASKS = [
    ("pretrain", 1e-5, 0.1),
    ("finetune", 1e-4, 0.1),
    ("segmentation", 2e-4, 0.2),
    ("detection", 2e-4, 0.2),
    ("knn", 1e-6, None),
    ("logistic", 1e-6, None),
    ("attention", 0.0, None),
]


@pytest.mark.long
@pytest.mark.parametrize(("task", "fp32", "bf16"), TASKS, ids=[task for task, *_ in TASKS])
def test_no_device_is_mixed(task: str, fp32: float, bf16: float | None, tmp_path: Path) -> None:
    """In fp32 the numbers are those of the CPU; in bf16 CUDA's autocast has lists of its own."""
    cases = [f"{task}:fp32", *([f"{task}:bf16"] if bf16 is not None else [])]
    for (name, found), most in zip(run_cases(tmp_path, *cases).items(), (fp32, bf16), strict=False):
        assert most is not None
        assert found["worst"] <= most, name
