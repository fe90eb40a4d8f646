"""What the benchmarks of detection and segmentation share:
a step and a test of a network on ViT-S/16, in three ways.

The baseline of the times is the same network with attention that writes out its matrix; that of the
memory is a step that keeps all activations, ours one that computes those of the ViT again. Each is
measured in a process of its own; peak memory is what it adds to the built model, so gradients and
moments count.
"""

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from step_cases import write_out_attention

from mugs.engine.metering import peak_memory_mb
from mugs.models.vit import ViT, build_vit

HERE = Path(__file__).resolve().parent
CPU = torch.device("cpu")
WAYS = (("fused", "kept"), ("written", "kept"), ("fused", "recomputed"))


@dataclass
class Measured:
    """Seconds of a step and of an image, MB above the built model after the step."""

    train: float
    test: float
    added: float


def backbone(attention: str, memory: str) -> ViT:
    vit = build_vit("vit_s16", drop_path=0.1)
    vit.activation_checkpointing = memory == "recomputed"
    if attention == "written":
        write_out_attention(vit)
    return vit


def measured(train: Callable[[], None], test: Callable[[], None]) -> Measured:
    before, start = peak_memory_mb(CPU), time.perf_counter()
    train()
    middle, added = time.perf_counter(), peak_memory_mb(CPU) - before
    test()
    return Measured(middle - start, time.perf_counter() - middle, added)


def row(name: str, ours: float, baseline: float, unit: str, note: str) -> dict[str, Any]:
    return {
        "name": name,
        "ours": ours,
        "baseline": baseline,
        "ratio": baseline / ours,
        "unit": unit,
        "note": note,
    }


def rows(script: str, name: str, *, train: str, test: str) -> list[dict[str, Any]]:
    """Rows of what `script` measures, with notes on its step and on its test."""
    ours, written, recomputed = (Measured(**call_script(script, *way)) for way in WAYS)
    memory = (
        f"peak above the built model of a training step; {ours.added:.0f} MB without recomputation"
    )
    return [
        row(f"{name}_train", ours.train, written.train, "s", f"{train}, first step"),
        row(f"{name}_test", ours.test, written.test, "s", test),
        row(
            f"{name}_memory",
            recomputed.added,
            ours.added,
            "MB",
            f"{memory}, step {recomputed.train:.1f} s",
        ),
    ]


def call_script(script: str, *arguments: str) -> Any:
    """What a script prints as JSON, run in a process of its own."""
    path = os.pathsep.join(map(str, (HERE.parent.parent, HERE, HERE.parent / "parity")))
    environment = {**os.environ, "PYTHONPATH": path}
    command = [sys.executable, script, *arguments]
    out = subprocess.run(command, env=environment, check=True, stdout=subprocess.PIPE, text=True)
    return json.loads(out.stdout)


def report(measure: Callable[[str, str], Measured]) -> None:
    """Print what a script measures in one of the ways."""
    torch.set_num_threads(2)
    sys.stdout.write(json.dumps(asdict(measure(*sys.argv[1:]))))
