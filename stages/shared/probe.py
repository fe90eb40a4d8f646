"""What one rank measures on the nodes of a cluster: disks, GPU, links to the other ranks.

`doctor --probe` runs it on every rank of a short job. Torch is imported in functions only, since
its import is one of the things that are measured.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pipeline.files import read_server_time, write_json_atomic
from pipeline.machine import describe_gpu, read_driver_version
from pipeline.probe_report import (
    DiskReport,
    ProbeRequest,
    RankReport,
    read_request,
    report_path,
)

if TYPE_CHECKING:
    import torch

_SMI = ("nvidia-smi", "--format=csv,noheader,nounits")
_ECC = "ecc.errors.uncorrected.volatile.total"
_TIMEOUT_S = 60
_MB = b"\x5a" * (1 << 20)


def probe_rank(folder: Path, rank: int) -> None:
    """Measure what the request in `folder` asks for, and write the report of this rank there."""
    request = read_request(folder)
    facts: dict[str, Any] = {"rank": rank}
    parts: tuple[tuple[str, Callable[[Path, ProbeRequest], Iterator[tuple[str, Any]]]], ...] = (
        ("disks", _measure_node),
        ("torch", _measure_gpu),
        ("ranks", _measure_links),
    )
    for name, measure in parts:
        facts["part"] = name
        try:
            for key, value in measure(folder, request):
                facts[key] = value
        except Exception as error:
            # The other ranks would wait for this one; the job's time limit ends them.
            facts["error"] = f"{type(error).__name__}: {error}".splitlines()[0]
            _write(folder, facts)
            raise
        _write(folder, facts)
    facts["part"] = "done"
    _write(folder, facts)


def _write(folder: Path, facts: dict[str, Any]) -> None:
    report = RankReport.model_validate(facts)
    write_json_atomic(report_path(folder, report.rank), report.model_dump(mode="json"))


def _is_first_of_node() -> bool:
    return os.environ.get("LOCAL_RANK", "0") == "0"


def _measure_node(folder: Path, request: ProbeRequest) -> Iterator[tuple[str, Any]]:
    yield "node", os.environ.get("SLURMD_NODENAME") or os.uname().nodename
    yield "cpus", len(os.sched_getaffinity(0))
    yield "has_sbatch", shutil.which("sbatch") is not None
    yield "driver", read_driver_version(Path("/proc/driver/nvidia/version"))
    if not _is_first_of_node():
        return
    before = time.time()
    server = read_server_time(folder)
    yield "clock_ahead_s", (before + time.time()) / 2 - server
    yield "shared_disk", measure_disk(folder, request)
    yield "local_disk", measure_disk(Path(tempfile.gettempdir()), request)
    yield "ffcv", _try_ffcv()


def measure_disk(folder: Path, request: ProbeRequest) -> DiskReport:
    """Write a large file and many small ones in a folder, and remove them."""
    with tempfile.TemporaryDirectory(prefix=".probe.", dir=folder) as name:
        scratch = Path(name)
        began = time.perf_counter()
        with open(scratch / "large", "wb", buffering=0) as file:
            for _ in range(request.disk_mb):
                file.write(_MB)
            os.fsync(file.fileno())
        large_s = time.perf_counter() - began
        fsyncs = sorted(_time_small_file(scratch / f"safe{number}") for number in range(5))
        began = time.perf_counter()
        for number in range(request.small_files):
            (scratch / f"small{number}").write_bytes(b"x")
        for number in range(request.small_files):
            (scratch / f"small{number}").unlink()
        small_s = time.perf_counter() - began
    return DiskReport(
        folder=str(folder),
        device=os.stat(folder).st_dev,
        free_gb=shutil.disk_usage(folder).free / 1e9,
        write_mb_s=request.disk_mb / large_s,
        fsync_ms=1000 * fsyncs[len(fsyncs) // 2],
        files_per_s=request.small_files / small_s,
    )


def _time_small_file(path: Path) -> float:
    """Return how long a small file takes until it is renamed and safe, as records are written."""
    began = time.perf_counter()
    write_json_atomic(path, {})
    return time.perf_counter() - began


def _try_ffcv() -> str:
    """Return why FFCV cannot be imported; "" if it can. In a process of its own: it may crash."""
    done = subprocess.run([sys.executable, "-c", "import ffcv"], capture_output=True, text=True)
    lines = done.stderr.strip().splitlines() or [f"exit code {done.returncode}"]
    return "" if done.returncode == 0 else lines[-1]


def _measure_gpu(folder: Path, request: ProbeRequest) -> Iterator[tuple[str, Any]]:
    began = time.perf_counter()
    import torch

    yield "import_s", time.perf_counter() - began
    yield "torch", torch.__version__
    yield "torch_cuda", torch.version.cuda
    if not request.gpu:
        return
    try:
        # Its error says why, such as a driver that is too old.
        torch.cuda.init()  # type: ignore[no-untyped-call]
        index = int(os.environ.get("LOCAL_RANK", "0")) % torch.cuda.device_count()
        yield "gpu", describe_gpu(torch.cuda.get_device_properties(index))
        problem, tflops = check_device(torch.device("cuda", index))
    except (RuntimeError, AssertionError, ZeroDivisionError) as error:
        # A build without CUDA asserts; no device at all is a division by zero.
        yield "gpu_problem", str(error).splitlines()[0] or "no GPU"
        return
    yield "tflops", tflops
    yield "gpu_problem", problem or _find_memory_errors()


def check_device(
    device: torch.device, *, size: int = 4096, seconds: float = 1.0
) -> tuple[str, float]:
    """Multiply matrices of whole numbers for a while; return what is wrong, and the TFLOP/s."""
    import torch

    torch.set_float32_matmul_precision("high")  # TF32 where there is any
    numbers = torch.arange(size * size, device=device).reshape(size, size)
    # Products of -1, 0 and 1 are exact, in TF32 too, and so are sums of a few thousand in fp32.
    matrix = (numbers * 7919 % 3 - 1).float()
    wanted = (matrix.double() @ matrix.double().sum(1)).cpu()
    product = matrix @ matrix
    count = 0
    began = time.perf_counter()
    while time.perf_counter() - began < seconds:
        product = matrix @ matrix
        count += 1
        if device.type == "cuda":
            torch.cuda.synchronize(device)
    lasted = time.perf_counter() - began
    right = torch.equal(product.double().sum(1).cpu(), wanted)
    return "" if right else "it multiplies matrices wrongly", 2 * size**3 * count / lasted / 1e12


def _find_memory_errors() -> str:
    """Return that nvidia-smi counts errors of the memory that were not corrected; "" if not."""
    with suppress(OSError, subprocess.SubprocessError):
        done = subprocess.run(
            [*_SMI, f"--query-gpu={_ECC}"], capture_output=True, text=True, timeout=_TIMEOUT_S
        )
        counts = [int(line) for line in done.stdout.split() if line.isdecimal()]
        if done.returncode == 0 and any(counts):
            return f"{sum(counts)} uncorrected memory errors since the driver was loaded"
    return ""


def _measure_links(folder: Path, request: ProbeRequest) -> Iterator[tuple[str, Any]]:
    if int(os.environ.get("WORLD_SIZE", "1")) == 1:
        return
    import torch.distributed as dist

    from mugs.distributed import init_process_group

    device = init_process_group(timeout_minutes=3.0)
    nodes: list[str] = [""] * dist.get_world_size()
    dist.all_gather_object(nodes, os.environ.get("SLURM_NODEID", "0"))
    for node in dict.fromkeys(nodes):
        members = [rank for rank, other in enumerate(nodes) if other == node]
        # Every rank takes part in making every group.
        group = dist.new_group(members)
        if len(members) > 1 and dist.get_rank() in members:
            yield "node_gb_s", _measure_all_reduce(device, request, len(members), group)
    if len(set(nodes)) > 1:
        yield "all_gb_s", _measure_all_reduce(device, request, len(nodes), None)
        yield "visible_s", _measure_visibility(folder, request)
    dist.barrier()


def _measure_all_reduce(
    device: torch.device, request: ProbeRequest, ranks: int, group: Any
) -> float:
    """Return GB/s of each rank's link: a ring sends 2 (n - 1) / n of the tensor over it."""
    import torch
    import torch.distributed as dist

    values = torch.ones(request.reduce_mb << 18, device=device)  # 4 bytes each
    times = []
    for _ in range(5):
        dist.barrier(group)
        began = time.perf_counter()
        dist.all_reduce(values, group=group)
        values[:1].item()  # waits for the GPU
        times.append(time.perf_counter() - began)
        values.fill_(1.0)
    moved = 2 * (ranks - 1) / ranks * values.numel() * values.element_size()
    return moved / min(times) / 1e9


def _measure_visibility(folder: Path, request: ProbeRequest) -> float | None:
    """Return how long after its rename a file of rank 0 is seen here, on the first of each node."""
    import torch.distributed as dist

    path = folder / "renamed.json"
    path.exists()  # a client that remembers that there was no such file sees it later
    dist.barrier()
    if dist.get_rank() == 0:
        write_json_atomic(path, {})
    dist.barrier()
    if not _is_first_of_node():
        return None
    began = time.perf_counter()
    while not path.exists() and time.perf_counter() - began < request.patience_s:
        time.sleep(0.05)
    return time.perf_counter() - began
