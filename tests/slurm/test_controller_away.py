"""Trainings and a keeper while there is no controller."""

import contextlib
import os
import signal
import time
from pathlib import Path
from typing import Any

import pytest

pytest.register_assert_rewrite("fault_case", "cluster_faults")

from cluster_faults import find_keepers, keep, keeper_finished, no_controller  # noqa: E402
from fault_case import Case  # noqa: E402

pytestmark = [pytest.mark.slurm, pytest.mark.long, pytest.mark.timeout(2400)]

AWAY_S = 45.0


@pytest.fixture
def toy(monkeypatch: pytest.MonkeyPatch) -> None:
    """Jobs find the stages of the toy training."""
    monkeypatch.setenv("PYTHONPATH", str(Path(__file__).parent))
    monkeypatch.setenv("OMP_NUM_THREADS", "1")


def test_a_controller_that_is_away_while_a_keeper_works(
    slurm_cluster: Any, toy: None, tmp_path: Path
) -> None:
    """Meanwhile one training is warned, another ends, and a keeper is at work on a third."""
    there = {"nodelist": slurm_cluster.nodes[0], "seconds": 1.0}
    elsewhere = {"nodelist": slurm_cluster.nodes[1], "partition": "low_cancel"}
    warned = Case(slurm_cluster, tmp_path / "warned", "warned", **there)
    ends = Case(slurm_cluster, tmp_path / "ends", "ends", **there)
    preempted = Case(slurm_cluster, tmp_path / "preempted", "preempted", **elsewhere)
    cases = [warned, ends, preempted]
    for case in cases:
        case.submit()
        keep(case)
    for case in (warned, ends):
        case.at_step(2)
    preempted.at_step(33)
    preempted.preempt()
    preempted.until(lambda: find_keepers(preempted), "the keeper starts")
    with no_controller(warned):
        for pid in warned.processes("-m slurm.node.job"):
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGUSR2)
        time.sleep(AWAY_S)
    for case in cases:
        case.finish(600)
        keeper_finished(case)
    assert [case.attempts() for case in cases] == [2, 1, 2]
    assert warned.result() == ends.result() == preempted.result()
