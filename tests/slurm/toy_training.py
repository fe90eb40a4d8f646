"""A training of a few numbers by the real loop, and a stage that depends on it."""

import atexit
import os
import time
from dataclasses import dataclass
from typing import Any

from pipeline.settings import Runtime
from pipeline.spec import StageConfig
from pipeline.stage import StageContext, StageOutput

# For the jobs that are started from here. Other tests may have stages of their own.
os.environ["MUGS_STAGE_MODULES"] = f"{os.environ.get('MUGS_STAGE_MODULES', '')},toy_training"


@dataclass(frozen=True, kw_only=True)
class Train(StageConfig):
    """`fault` at step 30, in the first attempt or "always", or "abort at exit".

    `later_seconds` a step from the second attempt on.
    """

    case: str
    steps: int = 60
    fault: Runtime[str] = ""
    seconds: Runtime[float] = 0.1
    later_seconds: Runtime[float | None] = None


@dataclass(frozen=True, kw_only=True)
class Digest(StageConfig):
    """Nothing to choose."""


class Sum:
    """A task for the loop: decaying sums of numbers drawn by step."""

    def __init__(self, ctx: StageContext, cfg: Train) -> None:
        import torch

        later = cfg.later_seconds if ctx.attempt > 1 else None
        self.seconds = cfg.seconds if later is None else later
        self.cfg, self.run_dir, self.total_steps = cfg, ctx.run_dir, cfg.steps
        self.value = torch.zeros(64, dtype=torch.float32)

    def steps(self, start: int) -> Any:
        import torch

        for step in range(start, self.total_steps):
            with (self.run_dir / "at").open("a") as file:
                file.write(f"{step}\n")
            time.sleep(self.seconds)
            strikes = self.cfg.fault.startswith(("crash", "hang")) and step == 30
            if strikes and not (self.run_dir / "spent").exists():
                self.fail()
            generator = torch.Generator().manual_seed(step)
            self.value = 0.9 * self.value + torch.randn(64, generator=generator)
            yield

    def fail(self) -> None:
        if not self.cfg.fault.endswith("always"):
            (self.run_dir / "spent").touch()
        if self.cfg.fault.startswith("hang"):
            time.sleep(1000)
        raise RuntimeError("CUDA error: an illegal memory access was encountered")

    def check_before_save(self) -> None:
        """There is nothing to check."""

    def state_dicts(self) -> Any:
        return {"sum": {"value": self.value}}

    def metadata(self) -> dict[str, Any]:
        return {}

    def load_state(self, parts: Any, notes: Any) -> None:
        self.value = parts["sum"]["value"]


def train(ctx: StageContext, cfg: Train) -> StageOutput:
    from mugs import distributed
    from mugs.engine.loop import train as loop

    distributed.init_process_group()
    if cfg.fault == "abort at exit":
        atexit.register(os.abort)
    task = Sum(ctx, cfg)
    loop(task, ctx.run_dir / "checkpoints", every=25, control=ctx.control)
    out = ctx.run_dir / "weights.txt"
    if distributed.is_main():
        out.write_text(task.value.numpy().tobytes().hex())
    distributed.barrier()
    return StageOutput(outputs={"weights": out})


def digest(ctx: StageContext, cfg: Digest) -> StageOutput:
    out = ctx.run_dir / "digest.txt"
    out.write_text(ctx.inputs["weights"].output("weights").read_text()[-40:])
    return StageOutput(outputs={"digest": out})
