"""The probe: what a rank measures, and what is concluded from the reports of all ranks."""

from pathlib import Path
from typing import Any

import pytest
import torch

from pipeline.files import write_json_atomic
from pipeline.findings import Finding
from pipeline.probe_report import (
    REQUEST,
    DiskReport,
    ProbeRequest,
    RankReport,
    read_report,
    report_path,
)
from pipeline.spec import ConfigError, Resources, StageRun
from slurm.shared import queue
from slurm.submission import probe
from slurm.submission.profile import ClusterProfile
from stages import STAGES
from stages.shared import probe as measure

REQUESTED = ProbeRequest(gpu=False, disk_mb=1, reduce_mb=1, small_files=3)
DISK = DiskReport(
    folder="/runs", device=1, free_gb=900, write_mb_s=800, fsync_ms=3, files_per_s=400
)
NEED = Resources(nodes=2, ranks_per_node=1, cpus_per_rank=14)


def report(rank: int, **changes: Any) -> RankReport:
    """Return what a rank of a healthy cluster reports."""
    facts: dict[str, Any] = {
        "rank": rank, "node": f"n{rank}", "part": "done", "cpus": 14, "has_sbatch": True,
        "clock_ahead_s": 0.2, "shared_disk": DISK, "ffcv": "", "driver": "580.1",
        "local_disk": DISK.model_copy(update={"folder": "/local", "device": 2}),
        "torch": "2.15", "torch_cuda": "13.2", "import_s": 9.0, "gpu": "A100", "tflops": 120.0,
        "all_gb_s": 20.0, "visible_s": 0.1,
    }  # fmt: skip
    return RankReport.model_validate(facts | changes)


def judge(
    *reports: RankReport, gb: float = 1.0, need: Resources = NEED, **profile: Any
) -> dict[str, Finding]:
    """Return the findings by subject; of several with one subject, a problem."""
    config = STAGES["pretrain"].config(arch="vit_mini", epochs=1, batch_size=64, threads=14)
    run = StageRun("pretrain", "train", "0" * 12, config, {}, need, "x:run")
    made = ClusterProfile.model_validate({"run_root": "/runs", **profile})
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(type(config), "estimate_checkpoint_gb", lambda self: gb)
        found = list(probe.judge_reports(reports, need, made, run, [run]))
    return {each.subject: each for each in sorted(found, key=lambda each: each.state == "wrong")}


def test_a_healthy_cluster() -> None:
    found = judge(report(0), report(1))
    assert {finding.state for finding in found.values()} == {"ok"}, found
    for subject, words in (
        ("CPUs", "14 CPUs, 14 were asked for; its loader has 14 threads"),
        ("torch", "2.15 (CUDA 13.2); its import takes up to 9 s"),
        ("GPU", "2 x A100, driver 580.1, 120 TFLOP/s"),
        ("links", "over 2 nodes: 20.00 GB/s all-reduce (NCCL)"),
        ("disk", "800 MB/s from each node, a record takes 3 ms, 400 small files a second"),
        ("visibility", "after 0.10 s"),
        ("local disk", "/local has 900 GB"),
        ("clocks", "n0 +0.2 s, n1 +0.2 s"),
        ("keeper", "nodes have sbatch"),
        ("lead time", "train saves in about 1 s"),
    ):
        assert words in found[f"probe {subject}"].detail


@pytest.mark.parametrize(
    ("subject", "changes", "remedy"),
    [
        ("CPUs", {"cpus": 2}, "--cpu-bind=cores"),
        ("torch", {"torch": "2.14"}, "set python"),
        ("GPU", {"gpu": "", "gpu_problem": "old driver"}, "MUGS_TORCH=cuda12 make setup"),
        ("GPU", {"gpu": "", "gpu_problem": "x", "driver": None}, "gpu_type"),
        ("GPU", {"gpu_problem": "it multiplies matrices wrongly"}, "exclude: n1"),
        ("GPU", {"tflops": 79.0}, "exclude: n1"),
        ("links", {"all_gb_s": 0.4}, "NCCL_SOCKET_IFNAME"),
        ("disk", {"shared_disk": DISK.model_copy(update={"files_per_s": 20})}, "run_root"),
        ("visibility", {"visible_s": 31.0}, "acdirmax"),
    ],
)
def test_what_to_change(subject: str, changes: dict[str, Any], remedy: str) -> None:
    found = judge(report(0), report(1, **changes))
    wrong = [each for each in found.values() if each.state == "wrong"]
    assert [each.subject for each in wrong] == [f"probe {subject}"], found
    assert remedy in wrong[0].remedy


def test_fewer_cpus_than_loader_threads() -> None:
    found = judge(report(0), report(1), cpus_per_rank=12)["probe CPUs"]
    assert found.remedy == "train: set cpus_per_rank in the profile to 14, or threads to 12"


def test_fewer_cpus_than_loader_threads_of_a_run_without_gpus() -> None:
    """The CPUs of a profile are those of ranks with GPUs."""
    need = NEED.model_copy(update={"gpu": False, "cpus_per_rank": 12})
    found = judge(report(0), report(1), need=need, cpus_per_rank=32)["probe CPUs"]
    assert found.remedy.endswith("resources.cpus_per_rank of the run to 14, or threads to 12")


def test_a_torch_without_cuda() -> None:
    changes = {"gpu": "", "gpu_problem": "x", "torch_cuda": None, "tflops": None}
    found = judge(report(0, **changes), report(1, **changes))
    assert "built without CUDA" in found["probe GPU"].remedy


def test_a_slow_disk_asks_for_an_earlier_warning() -> None:
    slow = DISK.model_copy(update={"write_mb_s": 20})
    found = judge(report(0, shared_disk=slow), report(1), gb=10.0)
    assert found["probe lead time"].remedy == "set signal_delay_s: 620 in the profile"
    enough = judge(report(0, shared_disk=slow), report(1), gb=10.0, signal_delay_s=620)
    assert enough["probe lead time"].state == "ok"


@pytest.mark.parametrize(
    ("subject", "changes"),
    [
        ("local disk", {"local_disk": DISK}),
        ("FFCV", {"ffcv": "no libturbojpeg"}),
        ("keeper", {"has_sbatch": False}),
    ],
)
def test_what_is_only_said(subject: str, changes: dict[str, Any]) -> None:
    found = [
        finding.state
        for finding in judge(report(0, **changes), report(1, **changes)).values()
        if finding.subject == f"probe {subject}"
    ]
    assert found == ["skipped"]


def test_one_rank_measures_and_writes_its_report(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(measure, "_try_ffcv", lambda: "not here")
    for name in ("LOCAL_RANK", "WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)
    write_json_atomic(tmp_path / REQUEST, REQUESTED.model_dump())
    measure.probe_rank(tmp_path, 0)
    found = read_report(report_path(tmp_path, 0))
    assert (found.part, found.ffcv, found.torch) == ("done", "not here", torch.__version__)
    assert found.shared_disk is not None and found.shared_disk.write_mb_s > 0
    assert abs(found.clock_ahead_s or 0.0) < 3600
    assert sorted(path.name for path in tmp_path.iterdir()) == ["rank_0000.json", REQUEST]


def test_a_rank_that_fails_says_where(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object) -> None:
        raise OSError("disk on fire")

    monkeypatch.setattr(measure, "measure_disk", fail)
    write_json_atomic(tmp_path / REQUEST, REQUESTED.model_dump())
    with pytest.raises(OSError, match="on fire"):
        measure.probe_rank(tmp_path, 0)
    found = read_report(report_path(tmp_path, 0))
    assert (found.part, found.error) == ("disks", "OSError: disk on fire")
    findings = list(
        probe._read_findings(
            tmp_path, "FAILED", NEED, ClusterProfile(run_root=tmp_path), *_run_and_all()
        )
    )
    told = [f"{each.subject}: {each.detail}" for each in findings if each.state == "wrong"]
    assert any("rank 0: OSError: disk on fire" in line for line in told)
    assert any("rank_0001.json: missing" in line for line in told)
    assert any("the job ended as FAILED in part disks" in line for line in told)
    assert tmp_path.is_dir()


def _run_and_all() -> tuple[StageRun, list[StageRun]]:
    run = StageRun("knn", "knn", "0" * 12, STAGES["knn"].config(), {}, NEED, "x:run")
    return run, [run]


def test_a_gpu_that_multiplies_wrongly_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    cpu = torch.device("cpu")
    assert measure.check_device(cpu, size=64, seconds=0.0)[0] == ""
    right = torch.Tensor.__matmul__

    def wrong(one: torch.Tensor, other: torch.Tensor) -> torch.Tensor:
        product = right(one, other)
        if product.dim() == 2:
            product[3, 5] += 1
        return product

    monkeypatch.setattr(torch.Tensor, "__matmul__", wrong)
    assert "wrongly" in measure.check_device(cpu, size=64, seconds=0.0)[0]


@pytest.mark.parametrize(
    ("text", "words"),
    [("", "missing or unreadable"), ('{"rank": 0}', "node"), ('{"rank": "x"}', "rank")],
)
def test_reports_that_cannot_be_read(tmp_path: Path, text: str, words: str) -> None:
    report_path(tmp_path, 0).write_text(text)
    with pytest.raises(ConfigError, match=words):
        read_report(report_path(tmp_path, 0))


@pytest.mark.parametrize(
    ("nodes", "ranks", "limit", "expected"),
    [(1, 8, 8, (1, 8)), (5, 8, 8, (2, 8)), (1, 8, 4, (2, 4)), (1, 8, 2, (2, 2))],
)
def test_the_shape_of_the_job(
    nodes: int, ranks: int, limit: int, expected: tuple[int, int]
) -> None:
    profile = ClusterProfile(run_root=Path("/runs"), gpus_per_node=limit)
    shape = probe.choose_probe_shape(profile, Resources(nodes=nodes, ranks_per_node=ranks))
    assert (shape.nodes, shape.ranks_per_node) == expected and shape.hours < 0.5


def test_the_end_of_the_job_is_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    states = iter(["PENDING", "RUNNING", "CANCELLED by 0", None])
    monkeypatch.setattr(queue, "query_job_state", lambda _: next(states))
    assert probe._wait("7", 0.0) == "CANCELLED by 0"
    assert probe._wait("7", 0.0) == "gone"
