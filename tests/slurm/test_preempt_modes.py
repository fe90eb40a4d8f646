"""All faults on clusters of each PreemptMode: each training ends as if nothing had happened.

Nobody types a command after the first `submit`: the keeper is queued with the runs.
"""

from pathlib import Path
from typing import Any

import pytest

pytest.register_assert_rewrite("fault_case", "job_faults", "cluster_faults")

from cluster_faults import CLUSTER_FAULTS, keep, keeper_finished  # noqa: E402
from fault_case import Case, Fault, Played, play  # noqa: E402
from job_faults import JOB_FAULTS  # noqa: E402

from pipeline import attempts  # noqa: E402

pytestmark = [pytest.mark.slurm, pytest.mark.long, pytest.mark.timeout(2400)]

# A person has to know of these; the preemptions and the keeper have tests of their own.
ENDED_BY_A_PERSON = ("cancelled", "canceled", "crashes_always")
OF_THE_CONTROLLER = ("controller_restarted", "controller_away")
OF_NODES = ("node_down", "node_dies", "node_seems_dead")
NODES = 2 * len(OF_NODES)
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


def list_shapes(nodes: int) -> list[Any]:
    """Return a cluster of so many nodes for each mode, with the mode."""
    return [
        pytest.param(
            {**shape, "partitions": PARTITIONS.format(mode=mode), "nodes": nodes}, mode, id=mode
        )
        for mode, shape in MODES.items()
    ]


@pytest.fixture
def toy(monkeypatch: pytest.MonkeyPatch) -> None:
    """Jobs find the stages of the toy training."""
    monkeypatch.setenv("PYTHONPATH", str(Path(__file__).parent))
    monkeypatch.setenv("OMP_NUM_THREADS", "1")


@pytest.mark.parametrize(("shaped_cluster", "mode"), list_shapes(2), indirect=["shaped_cluster"])
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


def kept(fault: Fault) -> Fault:
    """Return the fault with a keeper beside it, as `submit` queues one."""

    def with_keeper(case: Case) -> None:
        keep(case)
        fault(case)
        keeper_finished(case)

    return with_keeper


@pytest.mark.parametrize(
    ("shaped_cluster", "mode"), list_shapes(NODES), indirect=["shaped_cluster"]
)
def test_every_other_fault_in_every_mode(
    shaped_cluster: Any, mode: str, toy: None, tmp_path: Path
) -> None:
    found = {name: each for name, each in JOB_FAULTS.items() if name not in ENDED_BY_A_PERSON}
    # Each of them brings three jobs, which a machine with two cores has to start in time.
    played = play_kept(shaped_cluster, tmp_path, found, at_once=3)
    for name in OF_THE_CONTROLLER:
        # One at a time, as others would meet it, too; and on a cluster that is whole again.
        shaped_cluster.recover()
        one = {name: CLUSTER_FAULTS[name]}
        played |= play_kept(shaped_cluster, tmp_path, one, at_once=1)
    if shaped_cluster.namespaces:  # else a node cannot be killed alone
        shaped_cluster.recover()
        pairs = {name: choose_nodes(number) for number, name in enumerate(OF_NODES)}
        found = {
            name: (fault, {**options, **pairs[name]})
            for name, (fault, options) in CLUSTER_FAULTS.items()
            if name in pairs
        }
        played |= play_kept(shaped_cluster, tmp_path, found, at_once=len(found))
    problems = [f"{name}: {wrong}" for name, (_, wrong) in played.items() if wrong]
    assert not problems, "\n\n".join(problems)
    expected = played["undisturbed"][0].result()
    assert [name for name, (case, _) in played.items() if case.result() != expected] == []


def choose_nodes(number: int) -> dict[str, str]:
    """Return the options of a profile for two nodes of the cluster that no other number has."""
    first = 2 * number
    others = (node for node in range(NODES) if node not in (first, first + 1))
    return {"exclude": ",".join(f"n{node}" for node in others)}


def play_kept(
    cluster: Any, folder: Path, found: dict[str, tuple[Fault, dict[str, Any]]], *, at_once: int
) -> Played:
    """Play faults, with a keeper each."""
    cases = {name: Case(cluster, folder, name, **options) for name, (_, options) in found.items()}
    return play(cases, {name: kept(fault) for name, (fault, _) in found.items()}, at_once)
