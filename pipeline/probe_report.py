"""What each rank of a probe writes down (`doctor --probe`), for whoever reads it."""

from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict, NonNegativeFloat, NonNegativeInt

from pipeline.files import read_json
from pipeline.reading import validate_model
from pipeline.spec import ConfigError

REQUEST = "request.json"


class ProbeRequest(BaseModel):
    """What to measure, and how much of it."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    # Whether the ranks were given GPUs.
    gpu: bool
    # Of the file that is written to a disk.
    disk_mb: NonNegativeInt
    # Of the tensor that all ranks add up.
    reduce_mb: NonNegativeInt
    small_files: NonNegativeInt
    # How long to wait for a file of another node.
    patience_s: NonNegativeFloat = 60.0


class DiskReport(BaseModel):
    """What the disk of a folder does: a large file, and milliseconds until a small one is safe.

    `files_per_s` are small files made and removed. `device` tells disks of a node apart.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    folder: str
    device: NonNegativeInt
    free_gb: NonNegativeFloat
    write_mb_s: NonNegativeFloat
    fsync_ms: NonNegativeFloat
    files_per_s: NonNegativeFloat


class RankReport(BaseModel):
    """What one rank found. None and "" stand for what it did not measure.

    A rank writes its report after each part, so a rank that hangs leaves how far it came: `part` is
    disks | torch | ranks | done.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    rank: NonNegativeInt
    node: str
    part: str
    # Why it went no further.
    error: str = ""
    cpus: NonNegativeInt
    has_sbatch: bool
    # By how much the node's clock is ahead of that of the file server.
    clock_ahead_s: float | None = None
    shared_disk: DiskReport | None = None
    local_disk: DiskReport | None = None
    # Why FFCV cannot be imported; "" if it can.
    ffcv: str | None = None
    driver: str | None = None
    torch: str = ""
    torch_cuda: str | None = None
    import_s: NonNegativeFloat | None = None
    gpu: str = ""
    # Why the GPU cannot be used, or should not be.
    gpu_problem: str = ""
    tflops: NonNegativeFloat | None = None
    # All-reduce, in GB/s of each rank's link: among the ranks of a node, and among all.
    node_gb_s: NonNegativeFloat | None = None
    all_gb_s: NonNegativeFloat | None = None
    # Until a file that another node renamed was seen.
    visible_s: NonNegativeFloat | None = None


def report_path(folder: Path, rank: int) -> Path:
    """Return where a rank writes its report."""
    return folder / f"rank_{rank:04d}.json"


def read_report(path: Path) -> RankReport:
    """Return the report of a rank.

    Raises:
        ConfigError: it is missing, unreadable, or holds something else.
    """
    content: dict[str, Any] | None = read_json(path)
    if content is None:
        raise ConfigError(f"{path}: missing or unreadable")
    return validate_model(RankReport, content, str(path))


def read_request(folder: Path) -> ProbeRequest:
    """Return what to measure.

    Raises:
        ConfigError: the file is missing, unreadable, or holds something else.
    """
    path = folder / REQUEST
    return validate_model(ProbeRequest, read_json(path) or {}, str(path))
