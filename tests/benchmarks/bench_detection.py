"""Cascade Mask R-CNN on ViT-S/16 at full size: a training step and the test of one image of 800 x 1056.

The baseline of the times is the same network with attention that writes out its matrix; that of the memory is a step
that keeps all activations, ours one that computes those of the ViT again. Each is measured in a process of its own;
peak memory is what it adds to the built model, so gradients and moments count.
"""

import json
import os
import subprocess
import sys
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from bench_step_vits import peak_mb

from mugs.backbones.vit import build_vit
from mugs.transfer.detection.config import DetectorConfig
from mugs.transfer.detection.detector import Detector, build_detector
from mugs.transfer.detection.targets import Targets
from mugs.transfer.layer_decay import build_adamw

ROOT = Path(__file__).resolve().parents[2]
SIZE = (800, 1056)
OBJECTS = 7


@dataclass
class Measured:
    """Seconds of a step and of an image, MB above the built model after the step."""

    train: float
    test: float
    added: float


def network(attention: str, memory: str) -> Detector:
    vit = build_vit("vit_s16", drop_path=0.1)
    vit.recompute = memory == "recomputed"
    for module in vit.modules():
        if hasattr(module, "fused_attn"):
            module.fused_attn = attention == "fused"
    return build_detector(vit, DetectorConfig(), seed=0)


def objects(generator: torch.Generator) -> Targets:
    """Boxes of 60 to 360 pixels, their masks filled."""
    height, width = SIZE
    low = torch.rand(OBJECTS, 2, generator=generator) * torch.tensor([width - 361, height - 361])
    boxes = torch.cat([low, low + 60 + 300 * torch.rand(OBJECTS, 2, generator=generator)], dim=1)
    masks = torch.zeros(OBJECTS, height, width, dtype=torch.uint8)
    for mask, (x1, y1, x2, y2) in zip(masks, boxes.int().tolist(), strict=True):
        mask[y1:y2, x1:x2] = 1
    return Targets(boxes, torch.randint(0, 80, (OBJECTS,), generator=generator), masks, SIZE, 0)


def measure(attention: str, memory: str) -> Measured:
    torch.set_num_threads(2)
    generator = torch.Generator().manual_seed(0)
    model = network(attention, memory).train()
    optimizer = build_adamw(model, model.pyramid.vit, 0.8)
    image, target = torch.randn(1, 3, *SIZE, generator=generator), objects(generator)
    before, start = peak_mb(), time.perf_counter()
    torch.stack(list(model(image, [target]).values())).sum().backward()
    optimizer.step()
    train, added = time.perf_counter() - start, peak_mb() - before
    start = time.perf_counter()
    model.eval().detect(image, SIZE, (480, 634))
    return Measured(train, time.perf_counter() - start, added)


def row(name: str, ours: float, baseline: float, unit: str, note: str) -> dict[str, Any]:
    return {"name": name, "ours": ours, "baseline": baseline, "ratio": baseline / ours, "unit": unit, "note": note}


def in_process(attention: str, memory: str) -> Measured:
    path = os.pathsep.join([str(ROOT), str(ROOT / "tests" / "benchmarks"), str(ROOT / "tests" / "parity")])
    command = [sys.executable, __file__, attention, memory]
    environment = {**os.environ, "PYTHONPATH": path}
    out = subprocess.run(command, env=environment, check=True, stdout=subprocess.PIPE, text=True)
    return Measured(**json.loads(out.stdout))


def run() -> list[dict[str, Any]]:
    ours, written, recomputed = (
        in_process(*way) for way in (("fused", "kept"), ("written", "kept"), ("fused", "recomputed"))
    )
    memory = f"peak above the built model of a training step; {ours.added:.0f} MB without recomputation"
    size = f"one image of {SIZE[0]} x {SIZE[1]}"
    return [
        row("detection_train", ours.train, written.train, "s", f"Cascade Mask R-CNN ViT-S/16, {size}, first step"),
        row("detection_test", ours.test, written.test, "s", size),
        row("detection_memory", recomputed.added, ours.added, "MB", f"{memory}, step {recomputed.train:.1f} s"),
    ]


if __name__ == "__main__":
    sys.stdout.write(json.dumps(asdict(measure(*sys.argv[1:]))))
