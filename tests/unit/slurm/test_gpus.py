"""A rank of a Slurm job that does not see the GPUs it was given fails at once."""

import pytest
import torch

from slurm.node.job import NoGpuError, check_gpus


@pytest.fixture(autouse=True)
def job(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SUBMITIT_EXECUTOR", "slurm")
    monkeypatch.setenv("SLURMD_NODENAME", "gpu17")


@pytest.mark.parametrize(
    ("given", "seen", "ok"),
    [
        ("0,1,2,3", 4, True),
        ("2", 1, True),  # each rank is bound to its own
        ("0,1,2,3", 3, False),  # one fell off the bus: two ranks would share another
        ("0,1,2,3", 0, False),
        ("GPU-2f4c,GPU-77aa", 2, True),
        ("", 0, False),
        ("NoDevFiles", 0, False),  # so Slurm hides all GPUs
        ("GPU-2f4c,GPU-77aa", 1, False),
        ("MIG-3a,MIG-4b", 1, False),  # CUDA uses one part of a divided GPU
        ("MIG-3a", 1, True),
        ("", 2, True),  # a cluster that does not set it
    ],
)
def test_every_gpu_that_was_given_is_seen(
    monkeypatch: pytest.MonkeyPatch, given: str, seen: int, ok: bool
) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", given)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: seen)
    if ok:
        check_gpus(wanted=True)
    else:
        with pytest.raises(NoGpuError, match="on gpu17"):
            check_gpus(wanted=True)


def test_other_runs_need_none(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    check_gpus(wanted=False)
    monkeypatch.delenv("SUBMITIT_EXECUTOR")  # `run` on a laptop
    check_gpus(wanted=True)
