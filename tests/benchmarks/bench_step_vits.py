"""A full ViT-S/16 training step (batch 8, 2 + 2 large and 10 small crops, queues,
memories and prototypes 65,536).

Ours against a step of the release's shape (`release_step.py`) in fp32, in one run on two threads,
each in a process of its own: the median of the steps after the first. The note says which share of
our time is the floor: the matrix products of our step alone, timed in the same run. Peak memory is
what a process adds to the built model and its state; gradients and optimizer moments count as
added.
"""

import json
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from statistics import median
from typing import Any

import torch
from dense_step import call_script, row
from release_step import ReleasedStep, time_products
from step_cases import SCHEDULE

from mugs.data.loading.batch import Views
from mugs.engine.metering import peak_memory_mb
from mugs.engine.optim import build_pretrain_adamw
from mugs.methods.config import MugsConfig
from mugs.methods.mugs import Mugs
from mugs.pretrain.config import StepConfig
from mugs.pretrain.step import Trainer

BATCH = 8
CPU = torch.device("cpu")
STEPS = {"ours": 4, "released": 4}
RATES = {"epoch": 1, "lr": 1e-4, "wd": 0.04, "momentum": 0.99}


def views() -> Views:
    generator = torch.Generator().manual_seed(0)
    large = torch.randn(4, BATCH, 3, 224, 224, generator=generator)
    small = torch.randn(10, BATCH, 3, 96, 96, generator=generator)
    return Views(large, small, {"weak": torch.arange(BATCH) % 2 == 0})


def build_ours(precision: str) -> Callable[[Views], float]:
    """The product's step; it returns the loss."""
    method = Mugs(MugsConfig(drop_path=0.0))
    trainer = Trainer(
        method,
        build_pretrain_adamw(method.student),
        SCHEDULE,
        StepConfig(precision=precision),
        method.student,
    )
    return lambda batch: trainer.step([batch], 2).total.item()


def build_released() -> Callable[[Views], float]:
    """A step as the release takes it."""
    released = ReleasedStep(Mugs(MugsConfig(drop_path=0.0)), clip=3.0)
    return lambda batch: released.step(batch, **RATES)["total"]


@dataclass
class Measured:
    """Steps of one process: seconds and loss of each, MB above the built model, MB in total."""

    seconds: list[float]
    losses: list[float]
    added: float
    total: float


def measure(side: str, precision: str) -> Measured:
    torch.set_num_threads(2)
    batch = views()
    step = build_released() if side == "released" else build_ours(precision)
    if side == "floor":
        return Measured([time_products(lambda: step(batch))], [], 0.0, 0.0)
    before, times, losses = peak_memory_mb(CPU), [], []
    for _ in range(STEPS[side]):
        start = time.perf_counter()
        losses.append(step(batch))
        times.append(time.perf_counter() - start)
    return Measured(times, losses, peak_memory_mb(CPU) - before, peak_memory_mb(CPU))


def in_process(side: str, precision: str) -> Measured:
    return Measured(**call_script(__file__, side, precision))


def time_row(precision: str, ours: Measured, released: Measured) -> dict[str, Any]:
    mine = median(ours.seconds[1:])
    (floor,) = in_process("floor", precision).seconds
    note = (
        f"ViT-S/16, batch {BATCH}, loss differs by {abs(ours.losses[0] - released.losses[0]):.1e}"
    )
    note += f"; matrix products alone {floor:.1f} s, {floor / mine:.0%} of ours"
    return row(f"train_step_vits_{precision}", mine, median(released.seconds[1:]), "s", note)


def memory_row(ours: Measured, released: Measured) -> dict[str, Any]:
    note = f"peak above the built model, {ours.added / released.added:.0%} of it; "
    note += f"in total {ours.total:.0f} of {released.total:.0f} MB"
    return row("train_step_vits_memory", ours.added, released.added, "MB", note)


def run() -> list[dict[str, Any]]:
    ours, released = in_process("ours", "fp32"), in_process("released", "fp32")
    rows = [time_row("fp32", ours, released), memory_row(ours, released)]
    if torch.ops.mkldnn._is_mkldnn_bf16_supported():
        rows.append(time_row("bf16", in_process("ours", "bf16"), released))
    else:
        sys.stdout.write(
            "train_step_vits_bf16 left out: "
            "a CPU without bf16 units emulates them, 20 times slower\n"
        )
    return rows


if __name__ == "__main__":
    sys.stdout.write(json.dumps(asdict(measure(*sys.argv[1:]))))
