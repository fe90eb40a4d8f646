"""A full ViT-S/16 training step (batch 8, 2 + 2 large and 10 small crops, queues,
memories and prototypes 65,536).

Ours against the loop-by-loop reference with eager attention, in one run on two threads, each in a
process of its own. The baseline of every row is the reference in fp32. Ours is the median of the
steps after the first; a step of the reference takes so long that one is taken, the first. Peak
memory is what a process adds to the built model and its state; gradients and optimizer moments
count as added.
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
from naive_mugs import NaiveMugs
from step_cases import SCHEDULE, write_out_attention

from mugs.data.loading.batch import Views
from mugs.engine.metering import peak_memory_mb
from mugs.engine.optim import build_pretrain_adamw
from mugs.methods.config import MugsConfig
from mugs.methods.mugs import Mugs
from mugs.pretrain.config import StepConfig
from mugs.pretrain.step import Trainer

BATCH = 8
CPU = torch.device("cpu")
STEPS = {"ours fp32": 4, "ours bf16": 2, "naive fp32": 1}
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


def build_naive() -> Callable[[Views], float]:
    """The reference's step, with attention that writes out its matrix."""
    naive = NaiveMugs(Mugs(MugsConfig(drop_path=0.0)), clip=3.0)
    write_out_attention(naive.student, naive.teacher)
    return lambda batch: naive.step(batch, **RATES)["total"]


@dataclass
class Measured:
    """Steps of one process: seconds and loss of each, MB above the built model, MB in total."""

    seconds: list[float]
    losses: list[float]
    added: float
    total: float


def measure(side: str, precision: str) -> Measured:
    torch.set_num_threads(2)
    batch, step = views(), build_ours(precision) if side == "ours" else build_naive()
    before, times, losses = peak_memory_mb(CPU), [], []
    for _ in range(STEPS[f"{side} {precision}"]):
        start = time.perf_counter()
        losses.append(step(batch))
        times.append(time.perf_counter() - start)
    return Measured(times, losses, peak_memory_mb(CPU) - before, peak_memory_mb(CPU))


def in_process(side: str, precision: str) -> Measured:
    return Measured(**call_script(__file__, side, precision))


def time_row(precision: str, ours: Measured, naive: Measured) -> dict[str, Any]:
    note = f"ViT-S/16, batch {BATCH}, loss differs by {abs(ours.losses[0] - naive.losses[0]):.1e}"
    name = f"train_step_vits_{precision}"
    return row(name, median(ours.seconds[1:]), naive.seconds[0], "s", note)


def memory_row(ours: Measured, naive: Measured) -> dict[str, Any]:
    note = f"peak above the built model, {ours.added / naive.added:.0%} of it; "
    note += f"in total {ours.total:.0f} of {naive.total:.0f} MB"
    return row("train_step_vits_memory", ours.added, naive.added, "MB", note)


def run() -> list[dict[str, Any]]:
    ours, naive = in_process("ours", "fp32"), in_process("naive", "fp32")
    rows = [time_row("fp32", ours, naive), memory_row(ours, naive)]
    if torch.ops.mkldnn._is_mkldnn_bf16_supported():
        rows.append(time_row("bf16", in_process("ours", "bf16"), naive))
    else:
        sys.stdout.write(
            "train_step_vits_bf16 left out: "
            "a CPU without bf16 units emulates them, 20 times slower\n"
        )
    return rows


if __name__ == "__main__":
    sys.stdout.write(json.dumps(asdict(measure(*sys.argv[1:]))))
