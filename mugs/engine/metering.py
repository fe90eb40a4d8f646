"""Use of the device: peak memory, floating-point rate, and a profiler trace on request."""

import resource
import sys
from pathlib import Path
from typing import Any

import torch
from torch.profiler import profile, schedule

from mugs import distributed
from mugs.engine.peaks import device_peak_tflops

PROCESS_STATUS = Path("/proc/self/status")


def peak_memory_mb(device: torch.device) -> float:
    """Return the peak memory: allocated on a GPU, resident in this process otherwise."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**20
    lines = PROCESS_STATUS.read_text().splitlines() if PROCESS_STATUS.exists() else []
    # VmHWM is the better figure, but only Linux has it: a process that a larger one started takes
    # over the `ru_maxrss` of that one.
    for line in lines:
        if line.startswith("VmHWM"):
            return int(line.split()[1]) / 1024
    # macOS counts bytes, Linux KiB.
    scale = 2**20 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / scale


class Meter:
    """Fields of a metrics line. `flops` is what this rank's share of one step takes."""

    def __init__(self, device: torch.device, precision: str, flops: float) -> None:
        self.device = device
        self.flops = flops
        name = torch.cuda.get_device_name(device) if device.type == "cuda" else ""
        self.peak = device_peak_tflops(name, precision)

    def fields(self, steps: int, seconds: float) -> dict[str, Any]:
        """Return peak memory, TFLOP/s of one device, and its share of the peak if known."""
        rate = self.flops * steps / seconds / 1e12
        share = None if self.peak is None else rate / self.peak
        return {"peak_memory_mb": peak_memory_mb(self.device), "tflops": rate, "peak_share": share}


class TraceProfiler:
    """A profiler over `steps` steps after the first two; none if `steps` is 0.

    Opens in Perfetto.
    """

    def __init__(self, folder: Path, steps: int) -> None:
        self.folder = folder
        self.profiler = None
        if steps > 0:
            # The first two steps allocate and tune kernels, which would hide the usual ones.
            self.profiler = profile(
                schedule=schedule(wait=1, warmup=1, active=steps, repeat=1),
                on_trace_ready=self._write,
            )
            self.profiler.start()

    def _write(self, profiler: profile) -> None:
        self.folder.mkdir(parents=True, exist_ok=True)
        profiler.export_chrome_trace(str(self.folder / f"rank_{distributed.rank():04d}.json.gz"))

    def step(self) -> None:
        """Tell the profiler that a step is over."""
        if self.profiler is not None:
            self.profiler.step()

    def close(self) -> None:
        """Stop the profiler, which writes what it recorded."""
        if self.profiler is not None:
            self.profiler.stop()
