"""A stage that trains a counter for six steps, saves it after every second one, and reports it."""

import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pipeline.identity import run_id
from pipeline.spec import Resources, StageConfig, StageRun
from pipeline.stage import StageContext, StageOutput
from results.schema import ResultRow

# For the jobs that are started from here. Other tests may have stages of their own.
os.environ["MUGS_STAGE_MODULES"] = f"{os.environ.get('MUGS_STAGE_MODULES', '')},tiny_stage"


@dataclass(frozen=True, kw_only=True)
class TinyConfig(StageConfig):
    """Nothing to set but the length."""

    steps: int = 6


class Counter:
    """A task whose state is the sum of its steps."""

    def __init__(self, total_steps: int) -> None:
        import torch

        self.total_steps, self.state = total_steps, torch.zeros(300)

    def steps(self, start: int) -> Iterator[None]:
        for step in range(start, self.total_steps):
            self.state += step
            yield

    def check_before_save(self) -> None:
        """There is nothing to check."""

    def state_dicts(self) -> dict[str, dict[str, Any]]:
        return {"state": {"sum": self.state}, "more": {"half": self.state.half()}}

    def metadata(self) -> dict[str, Any]:
        return {"sum": float(self.state[0])}

    def load_state(self, parts: Any, notes: Any) -> None:
        self.state.copy_(parts["state"]["sum"])


def run(ctx: StageContext, cfg: TinyConfig) -> StageOutput:
    """Train, export, and report the sum as a row."""
    from mugs.checkpoint.save_load import SavePolicy
    from mugs.engine.loop import train
    from mugs.weights.backbone_file import write_backbone_file

    task = Counter(cfg.steps)
    train(task, ctx.run_dir / "checkpoints", every=2, policy=SavePolicy(retry_seconds=0))
    weights = ctx.run_dir / "weights" / "sum.safetensors"
    write_backbone_file(weights, {"sum": task.state}, {"steps": cfg.steps})
    row = ResultRow(
        ctx.run_id,
        "mugs",
        "tiny",
        1,
        ctx.stage,
        "digits",
        "sum",
        "top1",
        float(task.state[0]),
        "%",
        0,
    )
    return StageOutput(outputs={"sum": weights}, rows=[row])


def tiny_run() -> StageRun:
    """The run of this stage."""
    config = TinyConfig()
    return StageRun(
        "tiny",
        "tiny",
        run_id("tiny", config, {}),
        config,
        {},
        Resources(gpu=False),
        "tiny_stage:run",
    )


def finish(root: Path) -> Path:
    """Run it to the end in this process; returns its folder."""
    from pipeline import runfile
    from slurm.node.job import run_job

    folder = runfile.write_run_file(root, tiny_run())
    run_job(folder)
    return folder
