"""Faults on a real Slurm: each training ends with the weights of an undisturbed one,
and its dependent runs after it.

The trainings of one group run at the same time, each with a fault of its own;
a test per fault looks at the outcome.
"""

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

pytest.register_assert_rewrite("fault_case", "job_faults", "cluster_faults")

from cluster_faults import CLUSTER_FAULTS, WITHOUT_USER_SIGNAL  # noqa: E402
from fault_case import Case, Played, play  # noqa: E402
from job_faults import JOB_FAULTS  # noqa: E402

pytestmark = pytest.mark.slurm

# Slurm takes minutes to give up a node. The preemptions that are left give a warning and time to
# save, or neither.
LONG = (
    "node_seems_dead",
    "node_dies",
    "keeper_killed",
    "keeper_node_lost",
    "two_keepers",
    "preempted_warned_at_once",
    "preempted_with_grace",
)


@pytest.fixture(scope="module")
def toy() -> Iterator[None]:
    """Jobs find the stages of the toy training."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", str(Path(__file__).parent))
        patch.setenv("OMP_NUM_THREADS", "1")
        yield


@pytest.fixture(scope="module")
def played(
    shared_cluster: Any, toy: None, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Played]:
    """The faults that concern one job each."""
    folder = tmp_path_factory.mktemp("faults")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("SLURM_CONF", shared_cluster.env["SLURM_CONF"])
        only = os.environ.get("FAULTS", ",".join(JOB_FAULTS)).split(",")
        cases = {
            n: Case(shared_cluster, folder, n, **o) for n, (_, o) in JOB_FAULTS.items() if n in only
        }
        yield play(cases, {name: fault for name, (fault, _) in JOB_FAULTS.items()}, at_once=4)


@pytest.mark.parametrize("name", JOB_FAULTS)
def test_fault_of_a_job(played: Played, name: str) -> None:
    case, wrong = played[name]
    assert not wrong, wrong
    if name != "crashes_always":
        assert case.result() == played["undisturbed"][0].result()


@pytest.mark.slow
@pytest.mark.parametrize(
    "name",
    [
        pytest.param(name, marks=pytest.mark.long) if name in LONG else name
        for name in CLUSTER_FAULTS
    ],
)
def test_fault_of_the_cluster(
    name: str,
    played: Played,
    slurm_cluster: Any,
    toy: None,
    tmp_path: Path,
    request: pytest.FixtureRequest,
) -> None:
    fault, options = CLUSTER_FAULTS[name]
    line = "SlurmctldParameters=preempt_send_user_signal"
    if name in WITHOUT_USER_SIGNAL:
        slurm_cluster.configure(line, f"#{line}")
        request.addfinalizer(lambda: slurm_cluster.configure(f"#{line}", line))
    if "node_" in name and not slurm_cluster.namespaces:
        pytest.skip("no namespaces on this machine: a node cannot be killed alone")
    case = Case(slurm_cluster, tmp_path, name, **options)
    case.submit()
    fault(case)
    assert case.result() == played["undisturbed"][0].result()
