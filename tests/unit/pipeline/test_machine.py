"""The environment of an attempt: what is recorded, and what never is."""

import hashlib
import json
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

from pipeline import machine


def test_facts_of_this_machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in machine.SLURM_VARIABLES:
        monkeypatch.delenv(name, raising=False)
    facts = machine.describe_environment(tmp_path / "submission.sh")
    assert facts["python"].endswith("{}.{}.{}".format(*sys.version_info))
    assert facts["packages"]["numpy"] and facts["packages"]["mugs-repro"]
    assert list(facts["packages"]) == sorted(facts["packages"])
    assert facts["kernel"] and facts["cpu"]
    # A record holds nothing that is not known, and is JSON.
    assert all(facts.values()) and json.loads(json.dumps(facts)) == facts
    assert not {"slurm", "batch_script"} & facts.keys()


def test_only_named_variables_are_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    secrets = {
        "WANDB_API_KEY": "s3cret-1",
        "HF_TOKEN": "s3cret-2",
        "AWS_SECRET_ACCESS_KEY": "s3cret-3",
        "SLURM_JOB_ACCOUNT": "s3cret-4",
        "NCCL_AUTH": "s3cret-5",
        "HOME": "/home/s3cret-6",
    }
    known = {"OMP_NUM_THREADS": "3", "NCCL_ALGO": "Ring", "SLURM_JOB_ID": "17"}
    for name, value in (secrets | known).items():
        monkeypatch.setenv(name, value)
    facts = machine.describe_environment(tmp_path / "submission.sh")
    assert "s3cret" not in json.dumps(facts)
    assert facts["variables"].items() >= {"OMP_NUM_THREADS": "3", "NCCL_ALGO": "Ring"}.items()
    assert facts["slurm"]["SLURM_JOB_ID"] == "17"
    assert facts["variables"].keys() <= set(machine.VARIABLES)
    assert facts["slurm"].keys() <= set(machine.SLURM_VARIABLES)


def test_the_batch_script_of_a_job(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    script = tmp_path / "submission.sh"
    script.write_text("#!/bin/bash\n")
    monkeypatch.setenv("SLURM_JOB_ID", "17")
    digest = hashlib.sha256(b"#!/bin/bash\n").hexdigest()
    facts = machine.describe_environment(script)
    assert facts["batch_script"] == f"submission.sh, SHA-256 {digest}"


@pytest.mark.parametrize(
    ("text", "version"),
    [
        ("NVRM version: NVIDIA UNIX x86_64 Kernel Module  535.104.05  Sat Aug 19\n", "535.104.05"),
        (
            "NVRM version: NVIDIA UNIX Open Kernel Module for x86_64  550.54.15  Release Build\n",
            "550.54.15",
        ),
        ("something else\n", None),
    ],
)
def test_driver_version(tmp_path: Path, text: str, version: str | None) -> None:
    (tmp_path / "version").write_text(text)
    assert machine.read_driver_version(tmp_path / "version") == version
    assert machine.read_driver_version(tmp_path / "none") is None


def test_containers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in machine.CONTAINER_VARIABLES:
        monkeypatch.delenv(name, raising=False)
    assert machine.find_container(tmp_path) is None
    (tmp_path / ".dockerenv").touch()
    assert machine.find_container(tmp_path) == "docker"
    (tmp_path / "run").mkdir()
    (tmp_path / "run/.containerenv").write_text('engine="podman-4.9"\nimage="torch:2.4"\n')
    assert machine.find_container(tmp_path) == "torch:2.4"
    monkeypatch.setenv("APPTAINER_CONTAINER", "/images/mugs.sif")
    assert machine.find_container(tmp_path) == "/images/mugs.sif"


def test_what_torch_says_of_gpus(monkeypatch: pytest.MonkeyPatch) -> None:
    gpu = SimpleNamespace(name="NVIDIA H200", total_memory=139 * 2**30, major=9, minor=0)
    cuda = SimpleNamespace(
        is_available=lambda: True,
        is_initialized=lambda: True,
        device_count=lambda: 2,
        get_device_properties=lambda number: gpu,
        nccl=SimpleNamespace(version=lambda: (2, 20, 5)),
    )
    torch = SimpleNamespace(
        version=SimpleNamespace(cuda="12.4"),
        cuda=cuda,
        backends=SimpleNamespace(cudnn=SimpleNamespace(version=lambda: 90100)),
    )
    monkeypatch.setitem(sys.modules, "torch", torch)
    assert machine.describe_accelerator() == {
        "cuda": "12.4",
        "cudnn": "90100",
        "nccl": "2.20.5",
        "gpus": ["NVIDIA H200, 139 GiB, capability 9.0"] * 2,
    }
    # Libraries that do not load leave out what they would say, and nothing else.
    cuda.nccl = None
    assert machine.describe_accelerator().keys() == {"cuda", "cudnn", "gpus"}
    torch.version.cuda = None
    assert machine.describe_accelerator() == {}
    monkeypatch.delitem(sys.modules, "torch")
    assert machine.describe_accelerator() == {}
