"""Training steps on a GPU:
images per second and peak memory of ours against a step of the release's shape.

    python tests/benchmarks/bench_gpu.py    ViT-S/16, ViT-B/16; fp32 (TF32), bf16, bf16 compiled

Batch 32, 2 + 2 large and 10 small crops, queues, memories and prototypes 65,536, one GPU. The
released step (`release_step.py`) is warmed up and timed as ours, and never compiled: the compiled
row repeats its bf16 figure. Cases that would start after eight minutes are left out, and the table
says so.
"""

import gc
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import torch

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE.parent.parent), str(HERE.parent / "parity"), str(HERE)]

from release_step import ReleasedStep  # noqa: E402
from step_cases import SCHEDULE  # noqa: E402

from mugs.data.loading.batch import Views  # noqa: E402
from mugs.data.views.config import ViewRecipe  # noqa: E402
from mugs.engine.metering import Meter  # noqa: E402
from mugs.engine.optim import build_pretrain_adamw  # noqa: E402
from mugs.methods.config import MugsConfig  # noqa: E402
from mugs.methods.mugs import Mugs  # noqa: E402
from mugs.pretrain.config import StepConfig  # noqa: E402
from mugs.pretrain.step import Trainer  # noqa: E402

RATES = {"epoch": 1, "lr": 1e-4, "wd": 0.04, "momentum": 0.99}
BUDGET_SECONDS = 480.0
MODES = ("fp32", "bf16", "bf16 compiled")


@dataclass(frozen=True)
class Setup:
    """What is trained, and on what."""

    config: MugsConfig
    device: torch.device
    batch: int = 32
    sizes: tuple[int, int] = (224, 96)
    steps: int = 8

    def views(self, images: int) -> Views:
        large, small = (
            torch.randn(n, images, 3, s, s, device=self.device)
            for n, s in zip((4, 10), self.sizes, strict=True)
        )
        return Views(large, small, {"weak": torch.arange(images, device=self.device) % 2 == 0})


@dataclass
class Figures:
    """Images per second, MB at the peak, share of the device's peak rate."""

    rate: float = field(default=float("nan"))
    memory: float = field(default=float("nan"))
    share: float = field(default=float("nan"))


def measured(setup: Setup, step: Callable[[Views], object]) -> Figures:
    """Warm up twice, then time the steps."""
    cuda, views = setup.device.type == "cuda", setup.views(setup.batch)
    for _ in range(2):
        step(views)
    if cuda:
        torch.cuda.reset_peak_memory_stats()
        torch.cuda.synchronize()
    start = time.perf_counter()
    for _ in range(setup.steps):
        step(views)
    if cuda:
        torch.cuda.synchronize()
    seconds = time.perf_counter() - start
    memory = torch.cuda.max_memory_allocated() / 2**20 if cuda else float("nan")
    return Figures(setup.batch * setup.steps / seconds, memory)


def ours(setup: Setup, mode: str) -> Figures:
    method = Mugs(setup.config).to(setup.device)
    method.accelerate(compile="compiled" in mode)
    config = StepConfig(precision=mode.split()[0])
    trainer = Trainer(
        method, build_pretrain_adamw(method.student), SCHEDULE, config, method.student
    )
    figures = measured(setup, lambda views: trainer.step([views], 2))
    flops = method.count_step_flops(
        ViewRecipe(large_size=setup.sizes[0], small_size=setup.sizes[1]), setup.batch
    )
    meter = Meter(setup.device, config.precision, flops)
    figures.share = meter.fields(1, setup.batch / figures.rate)["peak_share"] or float("nan")
    return figures


def released(setup: Setup, mode: str) -> Figures:
    baseline = ReleasedStep(Mugs(setup.config).to(setup.device), clip=3.0)

    def step(views: Views) -> None:
        with torch.autocast(setup.device.type, dtype=torch.bfloat16, enabled=mode == "bf16"):
            baseline.step(views, **RATES)

    return measured(setup, step)


def table(setups: dict[str, Setup]) -> None:
    """Measure case by case and print one line for each."""
    began, shown = time.monotonic(), sys.stdout.write
    heads = ("arch", "mode", "img/s", "release", "ratio", "MB", "release", "memory", "of peak")
    shown(("{:10} {:14}" + " {:>9}" * 7 + "\n").format(*heads))
    for name, setup in setups.items():
        baseline = Figures()
        for mode in MODES:
            if time.monotonic() - began > BUDGET_SECONDS:
                shown(f"{name:10} {mode:14} left out: eight minutes are over\n")
                continue
            mine = ours(setup, mode)
            gc.collect()
            if mode != "bf16 compiled":
                baseline = released(setup, mode)
                gc.collect()
            shown(
                f"{name:10} {mode:14} {mine.rate:9.1f} {baseline.rate:9.2f} "
                f"{mine.rate / baseline.rate:9.1f}"
                f" {mine.memory:9.0f} {baseline.memory:9.0f} {mine.memory / baseline.memory:9.0%}"
                f" {mine.share:9.0%}\n"
            )
            sys.stdout.flush()


def main() -> None:
    if not torch.cuda.is_available():
        sys.exit("bench-gpu: no GPU here; nothing was measured")
    torch.set_float32_matmul_precision("high")
    device = torch.device("cuda")
    shape = {"ViT-S/16": "vit_s16", "ViT-B/16": "vit_b16"}
    sys.stdout.write(f"{torch.cuda.get_device_name()}, torch {torch.__version__}\n")
    table(
        {name: Setup(MugsConfig(arch=arch, drop_path=0.0), device) for name, arch in shape.items()}
    )


if __name__ == "__main__":
    main()
