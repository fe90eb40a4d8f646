"""What the doctor says about a real Slurm,
which takes and refuses jobs as it would when they are submitted.
"""

from pathlib import Path
from typing import Any

import pytest

from pipeline.findings import Finding
from slurm.submission.init_profile import write_profile
from slurm.submission.preflight import check_cluster
from slurm.submission.probe import probe_cluster
from slurm.submission.profile import load_profile
from stages.commands.reproduction import all_runs

pytestmark = pytest.mark.slurm


def findings(folder: Path, profile: str, *overrides: str) -> dict[str, Finding]:
    """By subject, about a reproduction of a data set and a pretraining on 8 GPUs."""
    path, plan = folder / "cluster.yaml", folder / "two.yaml"
    path.write_text(f"run_root: {folder}/runs\ncpus_per_rank: 1\nmemory_gb: 1\n{profile}\n")
    plan.write_text(
        "name: two\nruns:\n  digits: {stage: convert, dataset: d, num_classes: 10}\n"
        "  train: {stage: pretrain, needs: {data: digits}, arch: vit_mini, epochs: 1, "
        "batch_size: 64}\n"
    )
    return {
        found.subject: found
        for found in check_cluster(load_profile(str(path)), all_runs(str(plan), overrides))
    }


def test_a_dry_run_on_a_real_slurm(slurm_cluster: Any, tmp_path: Path) -> None:
    found = findings(tmp_path, "partition: low")
    assert {f.state for f in found.values()} <= {"ok", "skipped"}, found
    assert found["preemption"].detail == (
        "low: PreemptMode=REQUEUE, GraceTime=15 s: "
        "Slurm puts a preempted job back into the queue, and it resumes; "
        "it has 20 s to save (with KillWait=5 s), a save takes about 4 s"
    )
    assert found["partition"].detail == "low is UP" and "to start at" in found["jobs train"].detail
    assert not slurm_cluster.run("squeue", "-h").stdout.strip()
    found = findings(tmp_path, "partition: lo")
    assert found["partition"].remedy == "set partition to one of high, low, low_at_once, low_cancel"
    found = findings(tmp_path, "partition: low\nconstraint: h100", "train.resources.nodes=4")
    assert found["jobs train"].state == found["jobs digits"].state == "wrong", found


def test_what_a_dry_run_lets_pass(slurm_cluster: Any, tmp_path: Path) -> None:
    """Slurm takes a job that is above a partition's limits, as long as it does not enforce them."""
    change = ("scontrol", "update", "PartitionName=high")
    try:
        slurm_cluster.run(*change, "MaxNodes=1", "MaxMemPerNode=2000")
        found = findings(tmp_path, "partition: high", "train.resources.nodes=2")
        assert "high gives a job at most 1 nodes (MaxNodes)" in found["jobs train"].detail
        assert found["jobs digits"].state == "ok", found
        found = findings(tmp_path, "partition: high\nstages: {pretrain: {memory_gb: 3}}")
        assert "at most 1.95 GB of a node (MaxMemPerNode)" in found["jobs train"].detail
        slurm_cluster.run(*change, "State=DOWN")
        assert (
            "high is DOWN: it starts no job"
            in findings(tmp_path, "partition: high")["partition"].detail
        )
    finally:
        slurm_cluster.run(*change, "MaxNodes=UNLIMITED", "MaxMemPerNode=0", "State=UP")


def test_a_first_profile_works_as_it_is(slurm_cluster: Any, tmp_path: Path) -> None:
    out = tmp_path / "mine.yaml"
    write_profile(out, tmp_path / "runs", None, force=False)
    profile = load_profile(str(out))
    assert (profile.partition, profile.gpu_type, profile.gpus_per_node) == ("low", "a100", 8)
    runs = all_runs("mugs_vit_s16_ep100", ["imagenet.train_dir=/t", "imagenet.val_dir=/v"])
    found = check_cluster(profile, runs)
    assert {finding.state for finding in found} <= {"ok", "skipped"}, found


def test_a_probe_of_two_nodes(slurm_cluster: Any, tmp_path: Path) -> None:
    path = tmp_path / "cluster.yaml"
    (tmp_path / "stub").mkdir()
    (tmp_path / "stub/ffcv.py").touch()  # the real one takes seconds
    path.write_text(
        f"run_root: {tmp_path}/runs\npartition: low\nmemory_gb: 4\n"
        f"env: {{PYTHONPATH: {tmp_path}/stub}}\n"
    )
    overrides = [f"pretrain.{key}" for key in ("resources.nodes=2", "resources.cpus_per_rank=1")]
    overrides.append("pretrain.threads=1")
    runs = [run for run in all_runs("mini", overrides) if run.name == "pretrain"]
    jobs: list[str] = []
    found = {
        finding.subject.removeprefix("probe "): finding
        for finding in probe_cluster(
            load_profile(str(path)), runs, on_wait=jobs.append, pause_s=0.2
        )
    }
    folders = [path for path in tmp_path.glob("runs/probes/*/*")]
    told = [path.read_text() for folder in folders for path in folder.glob("*.err")]
    assert slurm_cluster.job(jobs[0])["NumNodes"] == "2", (found, told)
    # How fast the disk is at this moment may be anything on a busy machine.
    wrong = {name for name, finding in found.items() if finding.state == "wrong"}
    assert wrong <= {"disk", "visibility", "lead time"}, (found, told)
    assert not folders  # all was read
    assert "over 2 nodes" in found["links"].detail and "(gloo)" in found["links"].detail
    assert "1 were asked for; its loader has 1 threads" in found["CPUs"].detail
    assert "a renamed file is seen by other nodes after" in found["visibility"].detail
    assert "MB/s from each node" in found["disk"].detail
