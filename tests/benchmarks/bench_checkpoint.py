"""Saving the whole state of a ViT-S/B/L pretraining on this disk,
against a plain torch.save that training waits for.

Student, teacher, moments, queues and memories at their released sizes, as random tensors. Stall:
seconds that training stands still (a copy in main memory here, to it on a GPU); its row compares
with torch.save and fsync. Durable: seconds until the checkpoint is on disk for good, hashes
included. A size that main memory or the disk cannot hold is left out.
"""

import os
import shutil
import sys
import time
from pathlib import Path
from statistics import median
from typing import Any

import torch

from mugs.checkpoint.background import BackgroundWriter, SaveReport
from mugs.checkpoint.save_load import SavePolicy, StateDicts, state_bytes
from mugs.checkpoint.space import format_bytes
from mugs.engine.optim import build_pretrain_parameter_groups
from mugs.methods.config import MugsConfig
from mugs.methods.mugs import Mugs

BUILD = Path(__file__).resolve().parents[2] / "build"
ARCHS = ("vit_s16", "vit_b16", "vit_l16")
SAVES = 3


def shapes(arch: str) -> dict[str, dict[str, tuple[int, ...]]]:
    """Shapes of all tensors of the state, by part."""
    method = Mugs(MugsConfig(arch=arch))
    networks = {
        "student": method.student,
        "teacher": method.teacher,
        "extra_state": method.extra_state,
    }
    found = {
        part: {name: tuple(v.shape) for name, v in net.state_dict().items()}
        for part, net in networks.items()
    }
    trained: list[Any] = [
        p for group in build_pretrain_parameter_groups(method.student, 0.2) for p in group["params"]
    ]  # type: ignore[attr-defined]
    moments = {
        f"{i}.{name}": tuple(p.shape)
        for i, p in enumerate(trained)
        for name in ("exp_avg", "exp_avg_sq")
    }
    return {**found, "optimizer": moments}


def synthesize(sizes: dict[str, dict[str, tuple[int, ...]]]) -> StateDicts:
    """Random tensors of these shapes."""
    return {
        part: {name: torch.rand(shape) for name, shape in tensors.items()}
        for part, tensors in sizes.items()
    }


def available() -> int:
    """Bytes of main memory that can be taken."""
    lines = Path("/proc/meminfo").read_text().splitlines()
    return 1024 * next(int(line.split()[1]) for line in lines if line.startswith("MemAvailable"))


def ours(parts: StateDicts, folder: Path) -> list[SaveReport]:
    """Saves in the background; the first, which makes the buffers, is not counted."""
    writer, saved = BackgroundWriter(folder, SavePolicy()), []
    for step in range(SAVES + 1):
        writer.save(step, parts, {})
        saved.append(writer.wait())
    writer.close()
    return [one for one in saved[1:] if one is not None]


def plain(parts: StateDicts, folder: Path) -> list[float]:
    """Seconds of torch.save, with the file flushed to the disk."""
    folder.mkdir(parents=True)
    seconds = []
    for step in range(SAVES):
        began = time.perf_counter()
        with (folder / f"{step % 2}.pth").open("wb") as stream:
            torch.save(parts, stream)
            stream.flush()
            os.fsync(stream.fileno())
        seconds.append(time.perf_counter() - began)
    return seconds


def rows_of(arch: str) -> list[dict[str, Any]]:
    """Stall and time to durable of one architecture."""
    sizes = shapes(arch)
    size = 4 * sum(
        torch.Size(shape).numel() for tensors in sizes.values() for shape in tensors.values()
    )
    folder = BUILD / "bench_checkpoint"
    free = shutil.disk_usage(BUILD).free
    if available() < 2.5 * size or free < 6 * size:
        room = f"{format_bytes(available())} of main memory and {format_bytes(free)} of disk free"
        sys.stderr.write(f"{arch}: state of {format_bytes(size)} left out, {room}\n")
        return []
    parts = synthesize(sizes)
    try:
        saves, blocking = ours(parts, folder / "ours"), median(plain(parts, folder / "plain"))
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    times = {
        "stall": median(s.stall_s for s in saves),
        "durable": median(s.durable_s for s in saves),
    }
    note = (
        f"state of {format_bytes(state_bytes(parts))}; plain: torch.save and fsync, training waits"
    )
    row = {"baseline": blocking, "unit": "s", "note": note}
    return [
        {"name": f"save_{what}_{arch}", "ours": t, "ratio": blocking / t, **row}
        for what, t in times.items()
    ]


def run() -> list[dict[str, Any]]:
    BUILD.mkdir(exist_ok=True)
    return [row for arch in ARCHS for row in rows_of(arch)]
