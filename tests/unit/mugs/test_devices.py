"""Copies to a device, and constants that are copied there once."""

from typing import Any

import pytest
import torch

from mugs import devices


class Recorder:
    """A tensor that notes what is done with it."""

    def __init__(self) -> None:
        self.calls: list[Any] = []

    def pin_memory(self) -> "Recorder":
        self.calls.append("pinned")
        return self

    def to(self, device: torch.device, **options: bool) -> "Recorder":
        self.calls.append((device.type, options))
        return self


def test_only_a_copy_to_a_gpu_is_pinned_and_not_waited_for() -> None:
    tensor = Recorder()
    devices.copy_to_device(tensor, torch.device("cpu"))  # type: ignore[arg-type]
    assert tensor.calls == [("cpu", {})]
    devices.copy_to_device(tensor, torch.device("cuda", 1))  # type: ignore[arg-type]
    assert tensor.calls[1:] == ["pinned", ("cuda", {"non_blocking": True})]


def test_a_constant_is_made_once_for_each_type() -> None:
    cpu = torch.device("cpu")
    found = devices.make_constant((0.5, 3.0), torch.float64, cpu)
    assert found.tolist() == [0.5, 3.0] and found.dtype == torch.float64
    assert devices.make_constant((0.5, 3.0), torch.float64, cpu) is found
    assert devices.make_constant((0.5, 3.0), torch.float32, cpu).dtype == torch.float32


@pytest.mark.parametrize("before", [None, ":16:8"])
def test_a_workspace_that_the_user_chose_stays(
    monkeypatch: pytest.MonkeyPatch, before: str | None
) -> None:
    chosen: list[bool] = []
    monkeypatch.setattr(torch, "use_deterministic_algorithms", chosen.append)
    monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", before or "x")
    if before is None:
        monkeypatch.delenv("CUBLAS_WORKSPACE_CONFIG")
    devices.use_deterministic_algorithms()
    assert devices.os.environ["CUBLAS_WORKSPACE_CONFIG"] == (before or ":4096:8")
    assert chosen == [True]
