"""A preemption on clusters of each PreemptMode: the training ends as if nothing had happened.

Nobody types a command after the first `submit`: the keeper is queued with the runs.
"""

from pathlib import Path
from typing import Any

import pytest

pytest.register_assert_rewrite("fault_case", "cluster_faults")

from cluster_faults import keep  # noqa: E402
from fault_case import Case  # noqa: E402

from pipeline import attempts  # noqa: E402

pytestmark = [pytest.mark.slurm, pytest.mark.long, pytest.mark.timeout(2400)]

PARTITIONS = """PartitionName=low Default=YES PriorityTier=1 PreemptMode={mode} GraceTime=0
PartitionName=high PriorityTier=10 PreemptMode=OFF"""
MODES = {
    "CANCEL": {"preempt": "preempt/partition_prio\nPreemptMode=CANCEL"},
    "REQUEUE": {"preempt": "preempt/partition_prio\nPreemptMode=REQUEUE"},
    "SUSPEND": {"preempt": "preempt/partition_prio\nPreemptMode=SUSPEND,GANG"},
    "OFF": {"preempt": "preempt/none\nPreemptMode=OFF"},
}


def preempted(case: Case, mode: str) -> None:
    """A job of the high partition wants the whole node while the training runs."""
    case.at_step(33)
    case.preempt()
    case.finish()
    expected = {"CANCEL": 2, "REQUEUE": 2, "SUSPEND": 1, "OFF": 1}
    assert case.attempts() == expected[mode], attempts.read_interruption(case.run_dir, 1)
    if mode == "SUSPEND":
        assert case.facts()["SuspendTime"] != "None", case.facts()


SHAPES = [
    pytest.param({**shape, "partitions": PARTITIONS.format(mode=mode)}, mode, id=mode)
    for mode, shape in MODES.items()
]


@pytest.fixture
def toy(monkeypatch: pytest.MonkeyPatch) -> None:
    """Jobs find the stages of the toy training."""
    monkeypatch.setenv("PYTHONPATH", str(Path(__file__).parent))
    monkeypatch.setenv("OMP_NUM_THREADS", "1")


@pytest.mark.parametrize(("shaped_cluster", "mode"), SHAPES, indirect=["shaped_cluster"])
def test_a_preemption_in_every_mode(
    shaped_cluster: Any, mode: str, toy: None, tmp_path: Path
) -> None:
    results = []
    for name in ("undisturbed", "preempted"):
        case = Case(shaped_cluster, tmp_path, name)
        case.submit()
        keep(case)
        if name == "preempted":
            preempted(case, mode)
        case.finish()
        results.append(case.result())
    assert results[0] == results[1]
