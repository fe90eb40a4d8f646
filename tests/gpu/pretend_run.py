"""Run cases on a pretended device and print, as JSON, what was found; in a process of its own.

    python tests/gpu/pretend_run.py FOLDER CASE...

A case is `TASK:PRECISION`, a task of `tiny_tasks.py`, which is compared with the CPU, or
`step:DEPTH:PRECISION`: one pretraining step of as many blocks, whose launches are counted.
"""

import json
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [
    str(ROOT / part)
    for part in ("", "tests/gpu", "tests", "tests/parity", "tests/unit/data", "tests/unit/transfer")
]

import torch  # noqa: E402
from pretend_cuda import CUDA, PretendMode, install  # noqa: E402
from step_cases import SCHEDULE, SMALLEST  # noqa: E402
from tiny_tasks import TASKS  # noqa: E402

from mugs.data.loading.batch import Batch, make_box_noise  # noqa: E402
from mugs.data.loading.device import DeviceTransform  # noqa: E402
from mugs.data.views.config import ViewRecipe  # noqa: E402
from mugs.data.views.render.erase import ErasedBox, draw_boxes  # noqa: E402
from mugs.engine.optim import build_pretrain_adamw  # noqa: E402
from mugs.methods.mugs import Mugs  # noqa: E402
from mugs.models.config import ViTConfig  # noqa: E402
from mugs.pretrain.config import StepConfig, TrainConfig  # noqa: E402
from mugs.pretrain.step import Trainer  # noqa: E402
from mugs.pretrain.train import draw_micro_batch_uniforms  # noqa: E402

IMAGES = 4
RECIPE = ViewRecipe(large_size=32, small_size=16, num_small=10)


def compare_task(name: str, precision: str, folder: Path) -> dict[str, Any]:
    """Run a task on the CPU and on the pretended device; return the largest difference."""
    there_is_a_gpu = torch.cuda.is_available
    torch.cuda.is_available = lambda: False
    plain = TASKS[name](torch.device("cpu"), precision, folder / f"{name}-{precision}-cpu")
    torch.cuda.is_available = there_is_a_gpu
    with PretendMode():
        found = TASKS[name](CUDA, precision, folder / f"{name}-{precision}-cuda")
        waits = dict(PretendMode.watch.waits)
    worst = max(
        (
            (found[key] - value).abs().max().item()
            for key, value in plain.items()
            if len(value.shape)
        ),
        default=0.0,
    )
    return {"tensors": len(plain), "worst": worst, "waits": waits}


def make_batch() -> Batch:
    """Random bytes, with two erased boxes."""
    generator = torch.Generator().manual_seed(0)

    def draw(crops: int, size: int) -> torch.Tensor:
        shape = (crops, IMAGES, 3, size, size)
        return torch.randint(256, shape, generator=generator, dtype=torch.uint8)

    boxes = [ErasedBox(2, (3, 4, 10, 9), 3 * 32 * 32, 32), ErasedBox(5, (1, 1, 5, 5), 60000, 16)]
    ids = torch.arange(IMAGES)
    weak = {"weak": ids % 2 == 0}
    noise = make_box_noise([draw_boxes(0, 0, 0, boxes)])
    return Batch(draw(4, 32), draw(10, 16), noise, weak, ids, ids, epoch=0, step=11)


def count_step(depth: int, precision: str) -> dict[str, Any]:
    """Count launches and waits of a whole step: batch to the device, draws, losses, update."""
    shape = ViTConfig(embed_dim=24, depth=depth, num_heads=2, patch_size=8, image_size=32)
    options = replace(SMALLEST, arch=shape, drop_path=0.1, queue_size=64, memory_size=64)
    config = TrainConfig(epochs=8, batch_size=IMAGES, base_lr=1e-3, views=RECIPE)
    with PretendMode():
        method = Mugs(options).to(CUDA)
        trainer = Trainer(
            method,
            build_pretrain_adamw(method.student),
            SCHEDULE,
            StepConfig(precision=precision),
            method.student,
        )
        stage = DeviceTransform(CUDA, RECIPE)
        for step in (10, 11):
            watch = PretendMode.watch
            watch.kernels.clear()
            watch.waits.clear()
            views = stage(make_batch())
            draws = draw_micro_batch_uniforms(method, config, step, IMAGES)
            trainer.step([views], step, draws)
        return {
            "launches": sum(watch.kernels.values()),
            "waits": dict(watch.waits),
            "most": watch.kernels.most_common(40),
        }


def run_case(case: str, folder: Path) -> dict[str, Any]:
    """Run a case by its name."""
    kind, *rest = case.split(":")
    if kind == "step":
        return count_step(int(rest[0]), rest[1])
    return compare_task(kind, rest[0], folder)


if __name__ == "__main__":
    torch.set_num_threads(1)
    install(Path(sys.argv[1]))
    print(json.dumps({case: run_case(case, Path(sys.argv[1])) for case in sys.argv[2:]}))
