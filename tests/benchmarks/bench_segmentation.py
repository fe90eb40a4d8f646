"""UPerNet on ViT-S/16 at full size: a training step of two crops of 512, the test of an image, a frame of a video.

The baseline of the times is the same network with attention that writes out its matrix, and of the video step a full
sort in place of the search for the best five. The baseline of the memory is a step that keeps all activations, ours
one that computes those of the ViT again. Each is measured in a process of its own; peak memory is what it adds to the
built model, so gradients and moments count.
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
import torch.nn.functional as F
from bench_step_vits import peak_mb

from mugs.backbones.vit import build_vit
from mugs.transfer.layer_decay import build_adamw
from mugs.transfer.segmentation.inference import slide
from mugs.transfer.segmentation.model import Segmenter, SegmenterConfig, build_segmenter
from mugs.transfer.video import neighbourhood, propagated

ROOT = Path(__file__).resolve().parents[2]
CPU = torch.device("cpu")


@dataclass
class Measured:
    """Seconds of a step and of an image, MB above the built model after the step."""

    train: float
    test: float
    added: float


def network(attention: str, memory: str) -> Segmenter:
    vit = build_vit("vit_s16", drop_path=0.1)
    vit.allocate_positions(32, 32)
    vit.recompute = memory == "recomputed"
    for module in vit.modules():
        if hasattr(module, "fused_attn"):
            module.fused_attn = attention == "fused"
    return build_segmenter(vit, SegmenterConfig(variant="upernet", num_classes=150), seed=0)


def measure(attention: str, memory: str) -> Measured:
    torch.set_num_threads(2)
    generator = torch.Generator().manual_seed(0)
    model = network(attention, memory).train()
    optimizer = build_adamw(model, model.backbone.vit, 0.9)
    images = torch.randn(2, 3, 512, 512, generator=generator)
    labels = torch.randint(0, 150, (2, 512, 512), generator=generator)
    before, start = peak_mb(), time.perf_counter()
    model.set_draws(0, 0, 2, slice(0, 2), CPU)
    total = sum(model.loss(model(images), labels).values())
    total.backward()
    optimizer.step()
    train, added = time.perf_counter() - start, peak_mb() - before
    start = time.perf_counter()
    with torch.no_grad():
        slide(model.eval().logits, torch.randn(3, 512, 683), num_classes=150, window=512, stride=341)
    return Measured(train, time.perf_counter() - start, added)


def video_frame() -> dict[str, Any]:
    """One frame of 480 x 832 from eight others."""
    generator = torch.Generator().manual_seed(0)
    target, *sources = F.normalize(torch.randn(9, 1560, 384, generator=generator), dim=-1)
    labels = torch.rand(8, 1560, 3, generator=generator)
    near, references = neighbourhood(30, 52, 12, CPU), torch.stack(sources)

    def sorted_out() -> torch.Tensor:
        affinity = torch.exp(torch.einsum("pd,rqd->prq", target, references) / 0.1) * near[:, None]
        order = affinity.flatten(1).argsort(dim=1, descending=True)[:, :5]
        weights = affinity.flatten(1).gather(1, order)
        return torch.einsum("pk,pko->po", weights / weights.sum(1, keepdim=True), labels.flatten(0, 1)[order])

    start = time.perf_counter()
    got = propagated(target, references, labels, near, num_neighbours=5, temperature=0.1)
    middle = time.perf_counter()
    want = sorted_out()
    ours, theirs = middle - start, time.perf_counter() - middle
    note = f"480 x 832, 8 references, labels differ by {(got - want).abs().max().item():.1e}"
    return row("video_propagation", ours, theirs, "s", note)


def row(name: str, ours: float, baseline: float, unit: str, note: str) -> dict[str, Any]:
    return {"name": name, "ours": ours, "baseline": baseline, "ratio": baseline / ours, "unit": unit, "note": note}


def in_process(attention: str, memory: str) -> Measured:
    path = os.pathsep.join([str(ROOT), str(ROOT / "tests" / "benchmarks"), str(ROOT / "tests" / "parity")])
    command = [sys.executable, __file__, attention, memory]
    environment = {**os.environ, "PYTHONPATH": path}
    out = subprocess.run(command, env=environment, check=True, stdout=subprocess.PIPE, text=True)
    return Measured(**json.loads(out.stdout))


def run() -> list[dict[str, Any]]:
    ways = (("fused", "kept"), ("written", "kept"), ("fused", "recomputed"))
    ours, written, recomputed = (in_process(*way) for way in ways)
    memory = f"peak above the built model of a training step; {ours.added:.0f} MB without recomputation"
    return [
        row("segmentation_train", ours.train, written.train, "s", "UPerNet ViT-S/16, 2 crops of 512, first step"),
        row("segmentation_test", ours.test, written.test, "s", "512 x 683, two windows"),
        row("segmentation_memory", recomputed.added, ours.added, "MB", f"{memory}, step {recomputed.train:.1f} s"),
        video_frame(),
    ]


if __name__ == "__main__":
    sys.stdout.write(json.dumps(asdict(measure(*sys.argv[1:]))))
