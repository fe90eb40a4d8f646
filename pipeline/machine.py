"""The environment of an attempt: packages, machine, accelerator, container, Slurm job.

Whatever can explain that two runs of the same settings differ. Nothing of the user's environment
but the variables named here: others may hold secrets. A fact that is not known is left out.
"""

import hashlib
import importlib.metadata
import os
import platform
import re
import sys
from contextlib import suppress
from pathlib import Path
from typing import Any

# Variables that choose threads, devices, algorithms or precision.
VARIABLES = (
    "CUBLAS_WORKSPACE_CONFIG",
    "CUDA_DEVICE_ORDER",
    "CUDA_LAUNCH_BLOCKING",
    "CUDA_VISIBLE_DEVICES",
    "MKL_NUM_THREADS",
    "MUGS_TF32",
    "NCCL_ALGO",
    "NCCL_IB_DISABLE",
    "NCCL_P2P_DISABLE",
    "NCCL_PROTO",
    "NCCL_SHM_DISABLE",
    "NCCL_SOCKET_IFNAME",
    "NVIDIA_TF32_OVERRIDE",
    "OMP_NUM_THREADS",
    "PYTHONHASHSEED",
    "PYTORCH_CUDA_ALLOC_CONF",
    "TORCH_ALLOW_TF32_CUBLAS_OVERRIDE",
    "TORCH_CUDNN_V8_API_DISABLED",
)
# What Slurm says about the job; neither the account nor the user.
SLURM_VARIABLES = (
    "SLURM_CLUSTER_NAME",
    "SLURM_CPUS_PER_TASK",
    "SLURM_GPUS_ON_NODE",
    "SLURM_JOB_ID",
    "SLURM_JOB_NODELIST",
    "SLURM_JOB_NUM_NODES",
    "SLURM_JOB_PARTITION",
    "SLURM_NTASKS",
    "SLURM_RESTART_COUNT",
)
# Of Apptainer, its former name, and Slurm's own containers.
CONTAINER_VARIABLES = ("APPTAINER_CONTAINER", "SINGULARITY_CONTAINER", "SLURM_CONTAINER")
_LONGEST = 1000  # characters of a value


def describe_environment(batch_script: Path) -> dict[str, Any]:
    """Return the environment of this process; `batch_script` is that of its Slurm job."""
    facts = {
        "python": f"{platform.python_implementation()} {platform.python_version()}",
        "packages": list_packages(),
        "os": _find_line(Path("/etc/os-release"), r'PRETTY_NAME="?([^"]+)'),
        "kernel": f"{platform.system()} {platform.release()}",
        "libc": " ".join(filter(None, platform.libc_ver())),
        "cpu": _find_line(Path("/proc/cpuinfo"), r"model name\s*:\s*(.+)") or platform.machine(),
        "cpus_allowed": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else None,
        "memory_gb": _read_memory_gb(Path("/proc/meminfo")),
        "driver": read_driver_version(Path("/proc/driver/nvidia/version")),
        "container": find_container(Path("/")),
        "variables": _pick(VARIABLES),
        "slurm": _pick(SLURM_VARIABLES),
        **describe_accelerator(),
    }
    if facts["slurm"] and batch_script.is_file():
        # The newest job's script is there; a later job replaces it, so its hash is kept.
        digest = hashlib.sha256(batch_script.read_bytes()).hexdigest()
        facts["batch_script"] = f"{batch_script.name}, SHA-256 {digest}"
    return {name: value for name, value in facts.items() if value}


def describe_accelerator() -> dict[str, Any]:
    """Return what torch says about its build and its GPUs; nothing if it was not imported."""
    # Not an import: a stage that needs no torch must not pay for it.
    torch = sys.modules.get("torch")
    if torch is None or getattr(getattr(torch, "version", None), "cuda", None) is None:
        return {}
    facts: dict[str, Any] = {"cuda": str(torch.version.cuda)}
    # Versions of libraries are asked for only where there is a device: loading them may fail.
    with suppress(Exception):
        if torch.cuda.is_available():
            facts["cudnn"] = str(torch.backends.cudnn.version())
            facts["nccl"] = ".".join(map(str, torch.cuda.nccl.version()))
    # Properties of devices would start CUDA in a process that may not need it.
    with suppress(Exception):
        if torch.cuda.is_initialized():
            facts["gpus"] = [
                describe_gpu(torch.cuda.get_device_properties(number))
                for number in range(torch.cuda.device_count())
            ]
    return facts


def describe_gpu(properties: Any) -> str:
    """Return name, memory and compute capability of a GPU."""
    memory = f"{properties.total_memory / 2**30:.0f} GiB"
    return f"{properties.name}, {memory}, capability {properties.major}.{properties.minor}"


def list_packages() -> dict[str, str]:
    """Return the versions of all installed distributions, by name."""
    found: dict[str, str] = {}
    for distribution in importlib.metadata.distributions():
        # Of several on the path, the first one is imported; a damaged one has no name.
        name = distribution.metadata["Name"]
        if name:
            found.setdefault(re.sub(r"[-_.]+", "-", name).lower(), distribution.version)
    return dict(sorted(found.items()))


def read_driver_version(path: Path) -> str | None:
    """Return the version of NVIDIA's kernel module, or None."""
    return _find_line(path, r"Kernel Module.*?\s(\d+\.[\d.]+)")


def find_container(root: Path) -> str | None:
    """Return the image of the container that this process is in, or its kind; None if in none."""
    for name in CONTAINER_VARIABLES:
        if value := os.environ.get(name):
            return value[:_LONGEST]
    # Podman writes its image there, Docker an empty file.
    if (root / "run/.containerenv").exists():
        return _find_line(root / "run/.containerenv", r'image="([^"]+)"') or "podman"
    return "docker" if (root / ".dockerenv").exists() else None


def _pick(names: tuple[str, ...]) -> dict[str, str]:
    return {name: os.environ[name][:_LONGEST] for name in names if name in os.environ}


def _find_line(path: Path, pattern: str) -> str | None:
    """Return the first match in a file of the system; None if there is none or no such file."""
    with suppress(OSError):
        if found := re.search(pattern, path.read_text(encoding="utf-8", errors="replace")):
            return found[1].strip()[:_LONGEST]
    return None


def _read_memory_gb(path: Path) -> int | None:
    kib = _find_line(path, r"MemTotal:\s*(\d+) kB")
    return None if kib is None else round(int(kib) * 1024 / 1e9)
