"""Energy of GPUs: what is measured, what is summed, and that nothing is made up."""

import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from pipeline import attempts
from results.energy import format_energy, sum_energy_of_runs
from results.explain import describe_energy
from results.runs import FinishedRun, check_types, run_from_entry
from slurm.node import energy
from slurm.node.energy import EnergyMeter, read_counters, wait_for_ranks
from slurm.shared.costs import sum_energy


class NVMLError(Exception):
    """Whatever NVML refuses."""


class Machine:
    """A fake NVML with these counters, in millijoules; None: the GPU has no counter."""

    NVMLError = NVMLError

    def __init__(self, counters: dict[str, int | None]) -> None:
        self.counters = counters
        self.broken = False

    def nvmlInit(self) -> None:
        if self.broken:
            raise NVMLError("no driver")

    def nvmlShutdown(self) -> None:
        pass

    def nvmlDeviceGetCount(self) -> int:
        return len(self.counters)

    def nvmlDeviceGetHandleByIndex(self, number: int) -> str:
        return list(self.counters)[number]

    def nvmlDeviceGetUUID(self, handle: str) -> str:
        return handle

    def nvmlDeviceGetTotalEnergyConsumption(self, handle: str) -> int:
        value = self.counters[handle]
        if value is None:
            raise NVMLError("not supported")
        return value


@pytest.fixture
def machine(monkeypatch: pytest.MonkeyPatch) -> Machine:
    """Two GPUs with counters and one without; this process computes on the second."""
    fake = Machine({"GPU-aa-1": 5_000, "GPU-bb-2": 70_000, "GPU-cc-3": None})
    monkeypatch.setitem(sys.modules, "pynvml", fake)
    use_gpu(monkeypatch, "bb-2")
    return fake


def use_gpu(monkeypatch: pytest.MonkeyPatch, uuid: str | None) -> None:
    cuda = SimpleNamespace(
        is_initialized=lambda: True,
        current_device=lambda: 0,
        get_device_properties=lambda _: SimpleNamespace(uuid=uuid),
    )
    monkeypatch.setitem(sys.modules, "torch", SimpleNamespace(cuda=cuda))


def test_the_gpu_that_was_used_counts(machine: Machine, tmp_path: Path) -> None:
    assert read_counters() == {"GPU-aa-1": 5_000, "GPU-bb-2": 70_000}
    meter = EnergyMeter()
    machine.counters |= {"GPU-aa-1": 9_000_000, "GPU-bb-2": 70_000 + 7_200_000}
    meter.record(tmp_path, 1, 0)
    assert attempts.list_energy(tmp_path, 1) == {"GPU-bb-2": 7200.0}
    # Only the first call counts: what comes after the stage is none of its energy.
    machine.counters["GPU-bb-2"] = 10**9
    meter.record(tmp_path, 1, 0)
    assert attempts.list_energy(tmp_path, 1) == {"GPU-bb-2": 7200.0}
    # These files are no attempts.
    assert attempts.list_attempts(tmp_path) == []


@pytest.mark.parametrize("case", ["reset", "gone", "other", "old torch", "no CUDA"])
def test_what_is_not_known_is_not_recorded(
    case: str, machine: Machine, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    meter = EnergyMeter()
    if case == "reset":
        machine.counters["GPU-bb-2"] = 10
    elif case == "gone":
        machine.broken = True
    elif case == "other":  # a part of a GPU
        use_gpu(monkeypatch, "MIG-bb-2-1")
    elif case == "old torch":
        use_gpu(monkeypatch, None)
    else:
        monkeypatch.delitem(sys.modules, "torch")
    meter.record(tmp_path, 1, 0)
    assert attempts.count_energy(tmp_path, 1) == 0


def test_without_nvml_nothing_is_read(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setitem(sys.modules, "pynvml", None)
    assert read_counters() == {}
    fake = Machine({"GPU-aa-1": 1})
    fake.broken = True
    monkeypatch.setitem(sys.modules, "pynvml", fake)
    assert read_counters() == {}
    EnergyMeter().record(tmp_path, 1, 0)
    wait_for_ranks(tmp_path, 1, 8)  # returns at once
    assert not list(tmp_path.iterdir())


def test_an_error_beside_the_run_does_not_fail_it(
    machine: Machine, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    meter = EnergyMeter()

    def fail() -> Any:
        raise RuntimeError("CUDA is gone")

    monkeypatch.setattr(energy, "find_own_gpu", fail)
    meter.record(tmp_path, 1, 0)
    assert attempts.count_energy(tmp_path, 1) == 0


def test_the_first_rank_waits_for_the_others(tmp_path: Path) -> None:
    attempts.record_energy(tmp_path, 1, 0, "a", 1.0)
    wait_for_ranks(tmp_path, 1, 2, timeout_s=0.05)
    attempts.record_energy(tmp_path, 1, 1, "b", 1.0)
    wait_for_ranks(tmp_path, 1, 2, timeout_s=1e6)


def test_sums_say_what_was_not_measured(tmp_path: Path) -> None:
    assert sum_energy(tmp_path) is None
    first, second = (attempts.start_attempt(tmp_path, gpus=2) for _ in range(2))
    assert sum_energy(tmp_path) is None
    for rank, gpu in enumerate(("a", "b")):
        attempts.record_energy(tmp_path, first, rank, gpu, 1.8e6)
    # The second attempt was killed, so nobody knows what it took.
    assert sum_energy(tmp_path) == {"kwh": 1.0, "measured": 2, "of": 4}
    attempts.record_energy(tmp_path, second, 0, "a", 3.6e6)
    attempts.record_energy(tmp_path, second, 1, "b", 3.6e6)
    assert sum_energy(tmp_path) == {"kwh": 3.0, "measured": 4, "of": 4}


def test_ranks_on_one_gpu_count_it_once(tmp_path: Path) -> None:
    number = attempts.start_attempt(tmp_path, gpus=1)
    attempts.record_energy(tmp_path, number, 0, "a", 1.8e6)
    attempts.record_energy(tmp_path, number, 1, "a", 3.6e6)
    assert sum_energy(tmp_path) == {"kwh": 1.0, "measured": 1, "of": 1}


@pytest.mark.parametrize(
    ("found", "words"),
    [
        (None, ""),
        ({"kwh": 12.3456, "measured": 8, "of": 8}, ", 12.35 kWh of its GPUs"),
        (
            {"kwh": 1.0, "measured": 2, "of": 4},
            ", at least 1 kWh of its GPUs (2 of 4 measured, over all attempts)",
        ),
    ],
)
def test_words(found: Any, words: str) -> None:
    entry = {"run_id": "a", "stage": "s", "name": "n", "provenance": {"energy": found}}
    assert describe_energy(run_from_entry(entry)) == words


@pytest.mark.parametrize(
    ("energy", "gpus", "words"),
    [
        ({}, 8, ", whose energy no GPU counted"),
        ({}, 0, ", no GPUs whose energy would count"),
        (
            {"kwh": 12.5, "measured": 8, "of": 8},
            8,
            ", 12.5 kWh of its GPUs (4.75 kg CO2 at 380 g/kWh)",
        ),
    ],
)
def test_co2_stands_beside_measured_energy_only(
    energy: dict[str, float], gpus: int, words: str
) -> None:
    run = FinishedRun("a", "pretrain", "p", energy=energy, gpus=gpus)
    assert describe_energy(run, 380) == words


def test_energy_of_several_runs_says_what_was_not_measured() -> None:
    def run(**facts: Any) -> FinishedRun:
        return FinishedRun("a", "pretrain", "p", **facts)

    measured = run(energy={"kwh": 10.0, "measured": 8, "of": 8}, gpus=8)
    assert format_energy(sum_energy_of_runs([measured, measured, run()]), 380) == (
        "20 kWh (7.6 kg CO2 at 380 g/kWh)"
    )
    assert format_energy(sum_energy_of_runs([measured, run(gpus=4)])) == (
        "at least 10 kWh (8 of 12 measured, over all attempts)"
    )
    assert format_energy(sum_energy_of_runs([run(gpus=4)]), 380) == ""


@pytest.mark.parametrize(
    "energy", [[1], "much", {"kwh": 1.0}, {"kwh": "x", "measured": 1, "of": 1}, {"kwh": 1e300}]
)
def test_a_record_of_no_energy_is_refused(energy: Any) -> None:
    """Otherwise the sums over all runs would fail."""
    entry = {"run_id": "a", "stage": "pretrain", "name": "p", "provenance": {"energy": energy}}
    with pytest.raises(ValueError, match=r"provenance\.energy"):
        check_types(run_from_entry(entry))
