"""The record of a step that was not finite."""

import json
import math
from pathlib import Path

from mugs import distributed
from mugs.engine.step import StepResult
from pipeline.files import write_atomic


class NonFiniteError(RuntimeError):
    """A loss or gradient was not finite. The step changed no weight."""


def write_nonfinite_record(
    run_dir: Path, step: int, epoch: int, seed: int, ids: list[int], result: StepResult
) -> Path:
    """Write this rank's record of a bad step into `run_dir/failures/`, and return its path.

    Views and masks are functions of (seed, epoch, sample) and (seed, step). So the record and the
    last checkpoint are enough to run the step again.
    """

    # JSON has no NaN and no infinity, so these become text.
    def number(value: float) -> float | str:
        return value if math.isfinite(value) else str(value)

    record = {
        "step": step,
        "epoch": epoch,
        "rank": distributed.rank(),
        "world_size": distributed.world_size(),
        "seed": seed,
        "sample_ids": ids,
        "loss": number(result.total.item()),
        "losses": {name: number(value.item()) for name, value in result.losses.items()},
    }
    # A file per rank: each has other samples, and no rank waits for another.
    path = run_dir / "failures" / f"step_{step:08d}_rank_{distributed.rank():04d}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomic(path, json.dumps(record, indent=1))
    return path
