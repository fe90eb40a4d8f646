"""Which nodes fit a job, and what lets a job start that no node fits any more."""

from pathlib import Path

import pytest

from pipeline import attempts
from slurm.shared import nodes
from slurm.shared.queue import SCRIPT, QueuedJob, SlurmError

NODE = "NodeName={} CPUEfctv=64 RealMemory=500000 State={} Partitions={} ActiveFeatures={} Gres={}"
ROWS = [
    ("a1", "IDLE", "gpu,all", "a100,ib", "gpu:a100:8(S:0-1)"),
    ("a2", "ALLOCATED", "gpu,all", "a100,ib", "gpu:a100:8(S:0,1),nvme:1"),
    ("a3", "MIXED+DRAIN", "gpu,all", "a100,ib", "gpu:a100:8"),
    ("a4", "DOWN*", "gpu,all", "a100,ib", "gpu:a100:8"),
    ("v1", "IDLE+CLOUD+POWERED_DOWN", "gpu,all", "v100", "gpu:v100:4"),
    ("c1", "IDLE", "cpu,all", "", "(null)"),
]


class Scontrol:
    """Answers of scontrol about these nodes and one job."""

    def __init__(self, job: str = "") -> None:
        self.job = job
        self.calls: list[tuple[str, ...]] = []

    def __call__(self, *arguments: str) -> tuple[int, str]:
        self.calls.append(arguments)
        match arguments:
            case ("-o", "show", "node"):
                return 0, "\n".join(NODE.format(*row) for row in ROWS)
            case ("-o", "show", "reservation", _):
                return 0, "ReservationName=r Nodes=a2,v1"
            case ("-o", "show", "job", _):
                return 0, self.job
            case ("show", "hostnames", names):
                return 0, names.replace("a[1-2]", "a1,a2").replace(",", "\n")
        return 0, ""


def fields(**changed: str) -> dict[str, str]:
    return {"Partition": "gpu", "NumNodes": "1", "Features": "(null)"} | changed


@pytest.mark.parametrize(
    ("job", "fitting"),
    [
        (fields(), {"a1", "a2", "v1"}),  # a3 is drained, a4 is down, c1 is in another partition
        (fields(Partition="cpu"), {"c1"}),
        (fields(Partition="cpu,gpu"), {"a1", "a2", "v1", "c1"}),
        (fields(Features="a100"), {"a1", "a2"}),
        (fields(Features="a100|v100"), {"a1", "a2", "v1"}),
        (fields(Features="[a100|v100]"), {"a1", "a2", "v1"}),
        (fields(Features="(v100|a100)&ib"), {"a1", "a2"}),
        (fields(TresPerNode="gres:gpu:8"), {"a1", "a2"}),
        (fields(TresPerNode="gres/gpu:v100:2"), {"v1"}),
        (fields(TresPerNode="gres:gpu:a100:4,gres:nvme:1"), {"a2"}),
        (fields(TresPerNode="gres:gpu:a100:9"), set()),
        (fields(MinMemoryNode="400G"), {"a1", "a2", "v1"}),
        (fields(MinMemoryNode="490G"), set()),
        (fields(MinCPUsNode="96"), set()),
        (fields(MinCPUsNode="64", MinMemoryCPU="10G"), set()),
        (fields(NumNodes="2", NumCPUs="128"), {"a1", "a2", "v1"}),
        (fields(NumNodes="2", NumCPUs="130"), set()),
        (fields(Reservation="r"), {"a2", "v1"}),
    ],
)
def test_nodes_that_fit(job: dict[str, str], fitting: set[str]) -> None:
    assert nodes.find_fitting_nodes(job, Scontrol()) == fitting


@pytest.mark.parametrize(
    ("job", "node", "spared"),
    [
        (fields(Features="a100"), "a1", True),
        (fields(Features="a100", ExcNodeList="a2"), "a1", False),
        (fields(ExcNodeList="a[1-2]"), "v1", False),
        (fields(ExcNodeList="a[1-2]"), "a1", False),  # it is excluded already
        (fields(TresPerNode="gres:gpu:v100:4"), "v1", False),
        (fields(NumNodes="2"), "a1", True),
        (fields(NumNodes="3"), "a1", False),
        (fields(ReqNodeList="a1"), "a1", False),
    ],
)
def test_the_last_fitting_node_is_never_spared(
    job: dict[str, str], node: str, spared: bool
) -> None:
    assert nodes.can_spare_node(job, node, Scontrol()) == spared


@pytest.mark.parametrize(
    "job",
    [
        fields(Features="a100*2"),
        fields(Features="[a100|v100]", NumNodes="2"),
        fields(MinCPUsNode="many"),
    ],
)
def test_what_is_not_understood_is_an_error(job: dict[str, str]) -> None:
    with pytest.raises(SlurmError):
        nodes.can_spare_node(job, "a1", Scontrol())


def test_no_answer_about_nodes_is_an_error() -> None:
    with pytest.raises(SlurmError, match="contact"):
        nodes.find_fitting_nodes(fields(), lambda *_: (1, "Unable to contact slurm controller"))


STUCK = QueuedJob("7", "mugs-x", "PENDING", "BadConstraints")


@pytest.mark.parametrize(
    ("excluded", "kept", "left"),
    [
        ("a[1-2],v1", "a[1-2]", "a1,a2"),  # the profile excludes a1 and a2, a failure v1
        ("v1", "", ""),
        ("v1", "v1", None),  # the profile's own
        ("a[1-2]", "", None),  # nobody of ours failed there
        ("(null)", "", None),
    ],
)
def test_a_job_that_no_node_fits_gets_back_the_nodes_of_failures(
    tmp_path: Path, excluded: str, kept: str, left: str | None
) -> None:
    attempts.record_failure(
        tmp_path, attempts.start_attempt(tmp_path), error="x", log=tmp_path, host="v1"
    )
    (tmp_path / SCRIPT).write_text(f"#SBATCH --exclude='{kept}'\n" if kept else "")
    scontrol = Scontrol(f"JobState=PENDING ExcNodeList={excluded}")
    said = nodes.lift_exclusion(STUCK, tmp_path, scontrol)
    updates = [call for call in scontrol.calls if call[0] == "update"]
    assert updates == ([] if left is None else [("update", "JobId=7", f"ExcNodeList={left}")])
    assert ("v1" in said) == (left is not None)


@pytest.mark.parametrize("reason", ["Resources", "Priority", "Dependency"])
def test_a_job_that_waits_for_its_turn_is_left_alone(tmp_path: Path, reason: str) -> None:
    scontrol = Scontrol("ExcNodeList=v1")
    job = QueuedJob("7", "mugs-x", "PENDING", reason)
    assert job.can_run and not nodes.lift_exclusion(job, tmp_path, scontrol)
    assert scontrol.calls == []
