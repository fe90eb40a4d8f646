"""What a GPU of this machine makes of our code: one table, and one JSON file.

    python tests/benchmarks/bench_gpu.py [--out FILE] [--seconds 530] [--only SECTION ...] [--tiny]

Needs torch, torchvision, timm and numba, and no network; the package need not be installed. Each
section prints its lines as it ends, and one that fails says so and stops no other. What would begin
after the given time is left out and named. `--tiny` tries all sections in small, on a CPU too.

Sections: where (device and versions), same (CPU against GPU, bf16 against fp32), waits (of the host
in a step), repeat (is a step a function of its inputs, bit by bit), feed (loader and step at once),
rates (images per second of many cases), released (a step of the released shape), group (process
group and DDP), save (stall of a checkpoint), search (k-NN of ImageNet's size).
"""

import argparse
import gc
import importlib.util
import io
import json
import os
import sys
import time
import traceback
import warnings
from collections import Counter
from collections.abc import Callable
from contextlib import closing
from dataclasses import replace
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent.parent
sys.path[:0] = [str(ROOT), str(HERE), str(HERE.parent / "parity")]
if importlib.util.find_spec("pydantic") is None:
    sys.path.append(str(HERE / "bare"))

import numpy as np  # noqa: E402
import torch  # noqa: E402
import torch.nn.functional as F  # noqa: E402
from PIL import Image  # noqa: E402
from release_step import ReleasedStep  # noqa: E402
from step_cases import SCHEDULE, SMALLEST  # noqa: E402
from torch import Tensor  # noqa: E402

from mugs.checkpoint.host_copy import HostCopy  # noqa: E402
from mugs.data.loading.batch import Views  # noqa: E402
from mugs.data.loading.device import DeviceTransform  # noqa: E402
from mugs.data.loading.loader import make_loader  # noqa: E402
from mugs.data.loading.order import SampleOrder  # noqa: E402
from mugs.data.sources.base import ImageInMemory  # noqa: E402
from mugs.data.views.config import ViewRecipe  # noqa: E402
from mugs.distributed import set_tf32  # noqa: E402
from mugs.engine.metering import peak_memory_mb  # noqa: E402
from mugs.engine.optim import build_pretrain_adamw, flatten_optimizer_state  # noqa: E402
from mugs.engine.peaks import device_peak_tflops  # noqa: E402
from mugs.evaluation.knn import evaluate_knn  # noqa: E402
from mugs.methods.config import MugsConfig  # noqa: E402
from mugs.methods.mugs import Mugs  # noqa: E402
from mugs.models.config import ViTConfig  # noqa: E402
from mugs.models.stochastic_depth import draw_depth_uniforms  # noqa: E402
from mugs.pretrain.config import StepConfig  # noqa: E402
from mugs.pretrain.step import Trainer  # noqa: E402

CPU = torch.device("cpu")
RATES = {"epoch": 1, "lr": 1e-4, "wd": 0.04, "momentum": 0.99}
Facts = dict[str, Any]
# Architecture, images, precision, compiled; in the order of what is learned per second.
CASES = [
    ("vit_s16", 64, "fp32", False),
    ("vit_s16", 64, "bf16", False),
    ("vit_b16", 42, "fp32", False),
    ("vit_l16", 16, "fp32", False),
    ("vit_b16", 64, "bf16", False),
    ("vit_l16", 16, "bf16", False),
    ("vit_s16", 64, "bf16", True),
    ("vit_s16", 128, "fp32", False),
    ("vit_l16", 64, "bf16", False),
    ("vit_b16", 64, "bf16", True),
]


class JpegSource:
    """Photographs-to-be in memory: noise of several scales, as large as those of ImageNet."""

    classes = ("only",)

    def __init__(self, num: int, width: int, height: int) -> None:
        rng = np.random.default_rng(0)
        self.files = []
        for _ in range(num):
            small = Image.fromarray(rng.integers(0, 255, (height // 16, width // 16, 3), np.uint8))
            buffer = io.BytesIO()
            small.resize((width, height), Image.Resampling.BICUBIC).save(buffer, "JPEG", quality=90)
            self.files.append(buffer.getvalue())

    def __len__(self) -> int:
        return len(self.files)

    def read(self, index: int) -> bytes:
        return self.files[index]

    def locate(self, index: int) -> ImageInMemory:
        return ImageInMemory(self.files[index])

    def label(self, index: int) -> int:
        return 0

    def describe(self, index: int) -> str:
        return f"image {index} of the benchmark"


class Bench:
    """The sections, and what they found. `tiny` tries them in small."""

    def __init__(self, device: torch.device, seconds: float, tiny: bool) -> None:
        self.device = device
        self.tiny = tiny
        self.end = time.monotonic() + seconds
        self.found: list[Facts] = []

    def say(self, section: str, **facts: Any) -> None:
        """Keep a line of the table, and print it."""
        self.found.append({"section": section, **facts})
        shown = "  ".join(f"{name} {format_fact(value)}" for name, value in facts.items())
        sys.stdout.write(f"{section:9} {shown}\n")
        sys.stdout.flush()

    def seconds_left(self) -> float:
        return self.end - time.monotonic()

    def synchronize(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize()

    def pick(self, full: Any, tiny: Any) -> Any:
        return tiny if self.tiny else full

    def build(
        self, arch: str, precision: str = "fp32", device: torch.device | None = None
    ) -> Trainer:
        """Return a method of the paper's shape with its optimizer, on a device."""
        device = device or self.device
        config = MugsConfig(
            arch=arch,
            drop_path=0.3 if arch == "vit_l16" else 0.1,
            train_prototype_magnitude=arch != "vit_l16",
        )
        if self.tiny:
            shape = ViTConfig(embed_dim=24, depth=2, num_heads=2, patch_size=16, image_size=64)
            config = replace(SMALLEST, arch=shape, drop_path=0.1, memory_size=256, queue_size=256)
        method = Mugs(config).to(device)
        return Trainer(
            method,
            build_pretrain_adamw(method.student),
            SCHEDULE,
            StepConfig(precision=precision),
            method.student,
        )

    @property
    def recipe(self) -> ViewRecipe:
        return self.pick(ViewRecipe(), ViewRecipe(large_size=64, small_size=32, num_small=2))

    def views(self, images: int, device: torch.device | None = None, seed: int = 0) -> Views:
        """Return views with a little structure, so that the crops of an image are alike."""
        device = device or self.device
        recipe = self.recipe
        generator = torch.Generator().manual_seed(seed)
        base = torch.randn(images, 3, 14, 14, generator=generator)

        def crops(num: int, size: int) -> Tensor:
            smooth = F.interpolate(base, size=(size, size), mode="bilinear")
            noise = torch.randn(num, images, 3, size, size, generator=generator)
            return (smooth + 0.3 * noise).to(device)

        weak = {"weak": (torch.arange(images) % 2 == 0).to(device)}
        large = crops(recipe.num_large, recipe.large_size)
        return Views(large, crops(recipe.num_small, recipe.small_size), weak)

    def draws(self, trainer: Trainer, images: int, step: int) -> list[Tensor | None]:
        method = trainer.method
        return [
            draw_depth_uniforms(
                0,
                step,
                branches=method.num_depth_branches,
                crops=method.count_student_crops(self.recipe),
                batch_size=images,
            )
        ]

    def time_steps(self, step: Callable[[int], object], count: int) -> tuple[float, float]:
        """Return seconds per step, and the median of the seconds that the host is busy with one."""
        step(0)
        step(1)
        self.synchronize()
        began = time.perf_counter()
        host = []
        for index in range(count):
            since = time.perf_counter()
            step(index)
            host.append(time.perf_counter() - since)
        self.synchronize()
        return (time.perf_counter() - began) / count, sorted(host)[count // 2]

    # Sections, in order.

    def where(self) -> None:
        facts: Facts = {"torch": torch.__version__, "python": sys.version.split()[0]}
        facts["cores"] = len(os.sched_getaffinity(0))
        if self.device.type == "cuda":
            properties = torch.cuda.get_device_properties(0)
            facts |= {"gpu": properties.name, "gib": round(properties.total_memory / 2**30)}
            facts["cuda"] = torch.version.cuda
        self.say("where", **facts)

    def train(self, device: torch.device, precision: str, steps: int) -> tuple[list[float], Facts]:
        """Return the losses of some steps, and the student after them."""
        images = 4
        trainer = self.build("vit_s16", precision, device)
        losses = [
            float(
                trainer.step(
                    [self.views(images, device, step)], step, self.draws(trainer, images, step)
                ).total
            )
            for step in range(steps)
        ]
        return losses, {k: v.detach().cpu() for k, v in trainer.method.student.state_dict().items()}

    def same(self) -> None:
        set_tf32(False)
        torch.set_num_threads(max(1, len(os.sched_getaffinity(0)) - 1))
        plain, weights = self.train(CPU, "fp32", 3)
        torch.set_num_threads(1)
        found, others = self.train(self.device, "fp32", 3)
        # Attention does not depend on the key bias: its gradient is rounding noise.
        compared = [name for name in weights if not name.endswith("qkv.bias")]
        self.say(
            "same",
            what="CPU and device, strict fp32, 3 steps",
            worst_loss=max(abs(a - b) for a, b in zip(plain, found, strict=True)),
            worst_weight=max((weights[k] - others[k]).abs().max().item() for k in compared),
        )
        steps = self.pick(20, 3)
        plain, _ = self.train(self.device, "fp32", steps)
        set_tf32(True)
        for name, precision in (("TF32", "fp32"), ("bf16", "bf16")):
            found, _ = self.train(self.device, precision, steps)
            self.say(
                "same",
                what=f"{name} against fp32, {steps} steps",
                worst_loss=max(abs(a - b) for a, b in zip(plain, found, strict=True)),
                last_loss=found[-1],
            )

    def waits(self) -> None:
        if self.device.type != "cuda":
            self.say("waits", left_out="no GPU")
            return
        images = 8
        trainer = self.build("vit_s16")
        views = self.views(images)
        trainer.step([views], 0, self.draws(trainer, images, 0))
        self.synchronize()
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            torch.cuda.set_sync_debug_mode("warn")
            trainer.step([views], 1, self.draws(trainer, images, 1))
            torch.cuda.set_sync_debug_mode("default")
        places = Counter(f"{Path(w.filename).name}:{w.lineno}" for w in caught)
        self.say("waits", count=sum(places.values()), places=dict(places.most_common(8)))

    def repeat(self) -> None:
        for precision in ("fp32", "bf16"):
            _, one = self.train(self.device, precision, 3)
            _, other = self.train(self.device, precision, 3)
            differ = [name for name in one if not torch.equal(one[name], other[name])]
            self.say("repeat", precision=precision, tensors=len(one), differ=len(differ))

    def feed(self) -> None:
        images = self.pick(64, 4)
        source = JpegSource(self.pick(256, 8), *self.pick((500, 375), (80, 64)))
        trainer = self.build("vit_s16", "bf16")
        views = self.views(images)
        draws = self.draws(trainer, images, 0)
        alone, host = self.time_steps(lambda i: trainer.step([views], i, draws), self.pick(8, 2))
        stage = DeviceTransform(self.device, self.recipe)
        order = SampleOrder(len(source), seed=0, world=1, rank=0, batch_size=images)
        for threads in self.pick((4, 8, 14), (1,)):
            loader = make_loader(
                source,
                self.recipe,
                order,
                seed=0,
                threads=threads,
                loader="thread",
                annotate=trainer.method.annotate,
            )
            count = self.pick(8, 2)
            with closing(loader):
                batches = iter(loader.iterate(0, 1000))
                next(batches)
                since = time.perf_counter()
                for _ in range(count):
                    next(batches)
                loading = (time.perf_counter() - since) / count
                both, _ = self.time_steps(
                    lambda i, batches=batches: trainer.step([stage(next(batches))], i, draws),
                    count,
                )
            self.say(
                "feed",
                threads=threads,
                loader_img_s=images / loading,
                step_img_s=images / alone,
                together_img_s=images / both,
                host_ms=1e3 * host,
            )

    def rates(self) -> None:
        tiny = [("tiny", 4, "fp32", False), ("tiny", 4, "bf16", False)]
        for arch, images, precision, compiled in self.pick(CASES, tiny):
            case = {"arch": arch, "images": images, "precision": precision, "compiled": compiled}
            if self.seconds_left() < self.pick(150, 0):
                self.say("rates", **case, left_out="time")
                continue
            try:
                self.say("rates", **case, **self.measure_rate(arch, images, precision, compiled))
            except torch.cuda.OutOfMemoryError:
                self.say("rates", **case, failed="out of memory")

    def measure_rate(self, arch: str, images: int, precision: str, compiled: bool) -> Facts:
        release_memory(self.device)
        trainer = self.build(arch, precision)
        trainer.method.accelerate(compile=compiled)
        views = self.views(images)
        draws = self.draws(trainer, images, 0)
        seconds, host = self.time_steps(lambda i: trainer.step([views], i, draws), self.pick(8, 2))
        rate = trainer.method.count_step_flops(self.recipe, images) / seconds / 1e12
        name = torch.cuda.get_device_name() if self.device.type == "cuda" else ""
        peak = device_peak_tflops(name, precision)
        return {
            "img_s": images / seconds,
            "ms": 1e3 * seconds,
            "host_ms": 1e3 * host,
            "gib": peak_memory_mb(self.device) / 1024,
            "tflops": rate,
            "of_peak": None if peak is None else rate / peak,
        }

    def released(self) -> None:
        for arch, images in self.pick((("vit_s16", 64), ("vit_l16", 16)), (("vit_s16", 4),)):
            release_memory(self.device)
            baseline = ReleasedStep(self.build(arch).method, clip=3.0)
            views = self.views(images)
            seconds, _ = self.time_steps(
                lambda i, baseline=baseline, views=views: baseline.step(views, **RATES), 3
            )
            self.say("released", arch=arch, images=images, precision="fp32", img_s=images / seconds)

    def group(self) -> None:
        os.environ |= {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0"}
        os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29555"}
        torch.distributed.init_process_group("nccl" if self.device.type == "cuda" else "gloo")
        try:
            images = self.pick(64, 4)
            trainer = self.build("vit_s16")
            trainer.student = torch.nn.parallel.DistributedDataParallel(
                trainer.method.student, gradient_as_bucket_view=True
            )
            views = self.views(images)
            draws = self.draws(trainer, images, 0)
            seconds, _ = self.time_steps(lambda i: trainer.step([views], i, draws), self.pick(8, 2))
            self.say("group", ddp_img_s=images / seconds)
        finally:
            torch.distributed.destroy_process_group()

    def save(self) -> None:
        for arch in self.pick(("vit_s16", "vit_l16"), ("vit_s16",)):
            release_memory(self.device)
            trainer = self.build(arch)
            method = trainer.method
            parts = {
                "student": dict(method.student.state_dict()),
                "teacher": dict(method.teacher.state_dict()),
                "extra_state": dict(method.extra_state.state_dict()),
                "optimizer": flatten_optimizer_state(trainer.optimizer),
            }
            size = sum(tensor.nbytes for tensors in parts.values() for tensor in tensors.values())
            copy = HostCopy()
            took = []
            for _ in range(3):
                self.synchronize()
                since = time.perf_counter()
                copy.copy_from(parts)
                took.append(time.perf_counter() - since)
            self.say("save", arch=arch, gb=size / 1e9, first_s=took[0], next_s=took[-1])

    def search(self) -> None:
        rows, queries, width = self.pick((1_281_167, 50_000, 384), (2000, 100, 16))
        bank = torch.randn(rows, width, device=self.device)
        asked = torch.randn(queries, width, device=self.device)
        labels = torch.randint(1000, (rows,), device=self.device)
        truth = torch.randint(1000, (queries,), device=self.device)
        self.synchronize()
        since = time.perf_counter()
        evaluate_knn(
            bank,
            labels,
            asked,
            truth,
            num_classes=1000,
            ks=(10, 20, 100, 200),
            temperatures=(0.07,),
        )
        self.synchronize()
        self.say("search", rows=rows, queries=queries, seconds=time.perf_counter() - since)

    def run(self, names: list[str]) -> None:
        """Run sections; none can stop the next."""
        for name in names:
            if self.seconds_left() < self.pick(20, 0):
                self.say(name, left_out="time")
                continue
            try:
                getattr(self, name)()
            except Exception as error:
                traceback.print_exc()
                self.say(name, failed=f"{type(error).__name__}: {str(error)[:200]}")
            release_memory(self.device)


SECTIONS = [
    "where",
    "same",
    "waits",
    "repeat",
    "feed",
    "rates",
    "released",
    "group",
    "save",
    "search",
]


def release_memory(device: torch.device) -> None:
    """Free what the last case left, and forget its peak."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()


def format_fact(value: Any) -> str:
    """Return a number with four digits, and anything else as it is."""
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def main(arguments: list[str] | None = None) -> int:
    """Run the command line; return 1 if a section failed."""
    parser = argparse.ArgumentParser(description="Measure our code on the GPU of this machine.")
    parser.add_argument("--out", type=Path, default=ROOT / "build" / "bench_gpu.json")
    parser.add_argument("--seconds", type=float, default=530.0)
    parser.add_argument("--only", nargs="*", choices=SECTIONS, default=SECTIONS)
    parser.add_argument("--tiny", action="store_true", help="try all sections in small")
    options = parser.parse_args(arguments)
    cuda = torch.cuda.is_available()
    if not cuda and not options.tiny:
        sys.exit("bench-gpu: no GPU here; nothing was measured (--tiny tries it on the CPU)")
    device = torch.device("cuda", 0) if cuda else CPU
    set_tf32(True)
    bench = Bench(device, options.seconds, options.tiny)
    bench.run(options.only)
    options.out.parent.mkdir(parents=True, exist_ok=True)
    options.out.write_text(json.dumps(bench.found, indent=1, default=str) + "\n")
    sys.stdout.write(f"written to {options.out}\n")
    return int(any("failed" in facts for facts in bench.found))


if __name__ == "__main__":
    sys.exit(main())
