"""The energy that the GPU of a rank took during an attempt, by the counter of its driver (NVML).

It is that of the whole board, as NVML counts it: not of the host, and not of cooling. Without the
package nvidia-ml-py, a counter (before Volta), or a GPU of one's own (parts of a GPU by MIG),
nothing is recorded, and nothing is estimated.
"""

import importlib
import logging
import sys
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

from pipeline import attempts

logger = logging.getLogger(__name__)
# Ranks end a stage together; on a shared file system their records are seen a little later.
WAIT_S = 20.0


def read_counters() -> dict[str, int]:
    """Return the counter of each GPU of this machine, in millijoules, by its UUID."""
    try:
        # By name: the package is an extra.
        nvml: Any = importlib.import_module("pynvml")
    except ImportError:
        return {}
    found = {}
    try:
        nvml.nvmlInit()
    except nvml.NVMLError:
        return {}  # no driver
    try:
        for number in range(nvml.nvmlDeviceGetCount()):
            with suppress(nvml.NVMLError):  # it has no counter
                handle = nvml.nvmlDeviceGetHandleByIndex(number)
                uuid = nvml.nvmlDeviceGetUUID(handle)
                text = uuid.decode() if isinstance(uuid, bytes) else str(uuid)
                found[text] = int(nvml.nvmlDeviceGetTotalEnergyConsumption(handle))
    except nvml.NVMLError:
        return {}
    finally:
        with suppress(nvml.NVMLError):
            nvml.nvmlShutdown()
    return found


def find_own_gpu() -> str | None:
    """Return the UUID of the GPU that this process computes on; None if it uses none."""
    torch = sys.modules.get("torch")
    if torch is None or not torch.cuda.is_initialized():
        return None
    properties = torch.cuda.get_device_properties(torch.cuda.current_device())
    uuid = getattr(properties, "uuid", None)  # not in older versions of torch
    return None if uuid is None else str(uuid)


class EnergyMeter:
    """The energy of this rank's GPU since the attempt began."""

    def __init__(self) -> None:
        # Which of them is ours is known once torch has chosen it.
        self.start = read_counters()
        self.recorded = False

    def record(self, run_dir: Path, attempt: int, rank: int) -> None:
        """Record the energy so far, the first time this is called; nothing if it is not known."""
        if self.recorded or not self.start:
            return
        self.recorded = True
        # What is beside the run may not fail it.
        try:
            joules = self._read()
            if joules is not None:
                attempts.record_energy(run_dir, attempt, rank, *joules)
        except Exception as error:
            logger.warning("energy is not recorded: %s: %s", type(error).__name__, error)

    def _read(self) -> tuple[str, float] | None:
        own = find_own_gpu()
        now = read_counters()
        # NVML writes "GPU-" before the UUID that torch has.
        for uuid, before in self.start.items():
            # A counter starts at 0 again when the driver is loaded again.
            if own and uuid.endswith(own) and now.get(uuid, -1) >= before:
                return uuid, (now[uuid] - before) / 1000
        return None


def wait_for_ranks(run_dir: Path, attempt: int, ranks: int, timeout_s: float = WAIT_S) -> None:
    """Wait until all ranks have recorded their energy, or the time is over.

    Does nothing if this rank, the first one, recorded none: then the others have none either.
    """
    end = time.monotonic() + timeout_s
    while 0 < attempts.count_energy(run_dir, attempt) < ranks and time.monotonic() < end:
        time.sleep(0.1)
