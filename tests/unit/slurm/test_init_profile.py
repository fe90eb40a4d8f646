"""The first profile of a cluster, from made-up answers of Slurm."""

from pathlib import Path

import pytest

from pipeline.files import OverwriteError
from pipeline.spec import ConfigError
from slurm.submission import init_profile
from slurm.submission.profile import load_profile

GPU_NODE = "NodeName=g{} Gres={} CPUTot={} RealMemory={} State={} Partitions={}"
BOTH = "PartitionName=gpu State=UP MaxTime=2-00:00:00\nPartitionName=cpu Default=YES State=UP"


class FakeSlurm:
    """Answers the questions of init-cluster. `users` is what sacctmgr says, by field."""

    def __init__(self, partitions: str, nodes: list[str], users: dict[str, str]) -> None:
        self.partitions, self.nodes, self.users = partitions, "\n".join(nodes), users

    def __call__(self, program: str, *arguments: str, **_: object) -> tuple[int, str, str]:
        if program == "sacctmgr":
            field = arguments[-1].removeprefix("format=")
            return (0, self.users[field], "") if field in self.users else (1, "", "no accounting")
        return 0, self.partitions if arguments[-1] == "partition" else self.nodes, ""


def answer(
    monkeypatch: pytest.MonkeyPatch, partitions: str, nodes: list[str], **users: str
) -> None:
    monkeypatch.setattr("slurm.shared.queue.call_slurm", FakeSlurm(partitions, nodes, users))


def write(folder: Path, partition: str | None = None) -> tuple[str, list[str]]:
    out = folder / "mine.yaml"
    lines = init_profile.write_profile(out, Path("/runs"), partition, force=True)
    return out.read_text(), lines


def test_typed_gpus_and_a_partition_without(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    nodes = [
        GPU_NODE.format(1, "gpu:a100:8(S:0-1)", 128, 1_031_000, "IDLE", "gpu"),
        GPU_NODE.format(2, "gpu:a100:8(S:0-1)", 128, 1_031_000, "MIXED", "gpu"),
        GPU_NODE.format(3, "gpu:v100:4", 40, 380_000, "IDLE", "gpu"),
        GPU_NODE.format(4, "gpu:h100:8", 192, 2_000_000, "DOWN", "gpu"),
        GPU_NODE.format(5, "(null)", 24, 96_000, "IDLE", "cpu"),
    ]
    answer(monkeypatch, BOTH, nodes, Account="vision\n", QOS="normal,long\n")
    text, lines = write(tmp_path)
    profile = load_profile(str(tmp_path / "mine.yaml"))
    assert (profile.partition, profile.account, profile.gpu_type) == ("gpu", "vision", "a100")
    assert (profile.gpus_per_node, profile.cpus_per_rank, profile.memory_per_gpu_gb) == (8, 16, 125)
    assert profile.max_hours == 48
    convert = profile.stages["convert"]
    assert (convert.partition, convert.cpus_per_rank, convert.memory_gb) == ("cpu", 24, 64)
    assert "# qos: long   # yours: long, normal" in text
    assert "partition gpu, nodes with 8 GPUs (a100), 128 CPUs, 1031 GB" in lines[0]


def test_untyped_gpus_several_accounts_and_preemption(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    partitions = "PartitionName=all Default=YES State=UP MaxTime=UNLIMITED PreemptMode=CANCEL"
    nodes = [GPU_NODE.format(1, "gpu:4", 6, 30_000, "IDLE", "all")]
    answer(monkeypatch, partitions, nodes, Account="a\nb\n")
    text, _ = write(tmp_path)
    profile = load_profile(str(tmp_path / "mine.yaml"))
    assert profile.gpu_type is None and profile.account is None
    assert "# account: a   # yours: a, b" in text
    assert "PreemptMode=CANCEL, GraceTime=0 seconds" in text
    assert (profile.gpus_per_node, profile.cpus_per_rank, profile.memory_per_gpu_gb) == (4, 1, 7)
    assert profile.max_hours == 24
    convert = profile.stages["convert"]
    assert (convert.partition, convert.cpus_per_rank, convert.memory_gb) == (None, 6, 29)


@pytest.mark.parametrize(
    ("limit", "hours"), [("4:00:00", 4), ("0:59:59", 0.99), ("1-12:30:00", 36.5)]
)
def test_max_hours_is_never_above_the_limit(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, limit: str, hours: float
) -> None:
    nodes = [GPU_NODE.format(1, "gpu:a100:8", 64, 500_000, "IDLE", "gpu")]
    answer(monkeypatch, f"PartitionName=gpu State=UP MaxTime={limit}", nodes)
    write(tmp_path)
    assert load_profile(str(tmp_path / "mine.yaml")).max_hours == hours


def test_the_partition_with_the_most_gpus_that_is_up(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    partitions = "\n".join(
        f"PartitionName={name} State={state}"
        for name, state in (("big", "DOWN"), ("mid", "UP"), ("small", "UP"))
    )
    nodes = [
        *(GPU_NODE.format(i, "gpu:a100:8", 64, 500_000, "IDLE", "big,mid") for i in range(3)),
        GPU_NODE.format(9, "gpu:a100:4", 64, 500_000, "IDLE", "small"),
    ]
    answer(monkeypatch, partitions, nodes)
    assert '\npartition: "mid"\n' in write(tmp_path)[0]
    assert '\npartition: "small"\n' in write(tmp_path, "small")[0]


@pytest.mark.parametrize(
    ("gres", "state", "partition", "words"),
    [
        ("(null)", "IDLE", None, "no node of this cluster has GPUs"),
        ("gpu:a100:8", "DOWN", None, "no node of this cluster has GPUs"),
        ("gpu:a100:8", "DRAINED", "gpu", "no node of partition gpu has GPUs"),
        ("gpu:a100:8", "IDLE", "cpu", "no node of partition cpu has GPUs"),
        ("gpu:a100:8", "IDLE", "gpus", "there is no partition 'gpus'; there are cpu, gpu"),
    ],
)
def test_what_makes_no_profile_is_said(
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    gres: str,
    state: str,
    partition: str | None,
    words: str,
) -> None:
    answer(monkeypatch, BOTH, [GPU_NODE.format(1, gres, 64, 500_000, state, "gpu")])
    with pytest.raises(ConfigError, match=words):
        write(tmp_path, partition)
    assert not (tmp_path / "mine.yaml").exists()


def test_a_file_is_overwritten_only_if_asked(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    answer(monkeypatch, BOTH, [GPU_NODE.format(1, "gpu:a100:8", 64, 500_000, "IDLE", "gpu")])
    out = tmp_path / "mine.yaml"
    write(tmp_path)
    out.write_text(out.read_text() + "# edited\n")
    with pytest.raises(ConfigError, match="is there already; --force overwrites it"):
        init_profile.write_profile(out, Path("/runs"), None, force=False)
    assert out.read_text().endswith("# edited\n")
    with pytest.raises(OverwriteError):
        init_profile.write_profile(tmp_path, Path("/runs"), None, force=True)
