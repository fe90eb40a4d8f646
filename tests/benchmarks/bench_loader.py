"""Multi-crop loaders against the plain way (plain_views.py), over the same images, in one run."""

import importlib
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, closing
from importlib.util import find_spec
from pathlib import Path
from statistics import median
from typing import Any
from unittest.mock import patch

import numpy as np
import torch
from numba.core.dispatcher import Dispatcher
from PIL import Image
from plain_views import plain_loader

from mugs.data.loading.config import LoaderName
from mugs.data.loading.drawing import Place, TrainingViews
from mugs.data.loading.loader import make_loader
from mugs.data.loading.order import SampleOrder
from mugs.data.loading.view_loader import ViewLoader
from mugs.data.loading.worker_pool import copy_pixels
from mugs.data.sources.base import Source
from mugs.data.sources.beton import BetonSource
from mugs.data.sources.convert import convert_to_beton
from mugs.data.sources.decode import decode_rgb
from mugs.data.sources.folder import FolderSource
from mugs.data.sources.open import open_source
from mugs.data.views.annotate import annotate_nothing
from mugs.data.views.config import ViewRecipe
from mugs.data.views.plan import plan_views
from mugs.data.views.render import fast
from mugs.hashed_draws import box_muller

NUM, PASSES, BATCH, WORKERS, ROUNDS = 64, 3, 16, 2, 5


def photographs(root: Path) -> None:
    """Smooth noise with some grain, 500 x 375, quality 90:
    files of the size ImageNet's have, some 100 kB.
    """
    rng = np.random.default_rng(0)
    (root / "a").mkdir(parents=True)
    for i in range(NUM):
        small = Image.fromarray(rng.integers(0, 255, (94, 125, 3), dtype=np.uint8))
        pixels = np.asarray(small.resize((500, 375), Image.Resampling.BICUBIC)).astype(np.int16)
        pixels = pixels + rng.normal(0, 8, (375, 500, 1)).astype(np.int16)
        Image.fromarray(pixels.clip(0, 255).astype(np.uint8)).save(
            root / f"a/{i:03d}.jpg", quality=90
        )


def ours(stack: ExitStack, source: Source, name: LoaderName) -> Callable[[], Iterable[Any]]:
    """PASSES over the images by one of our front ends."""
    loader = make_warm_loader(stack, source, name)
    return lambda: loader.iterate(0, PASSES * NUM // BATCH)


def make_warm_loader(stack: ExitStack, source: Source, name: LoaderName) -> ViewLoader:
    """One of our front ends, for as long as the stack lives."""
    return stack.enter_context(
        closing(
            make_loader(
                source,
                ViewRecipe(),
                SampleOrder(NUM, seed=0, world=1, rank=0, batch_size=BATCH),
                seed=0,
                threads=WORKERS,
                loader=name,
            )
        )
    )


def rate(batches: Callable[[], Iterable[Any]]) -> float:
    """Images per second from the first read to the last batch:
    nothing is under way before or after.
    """
    start = time.perf_counter()
    for _ in batches():
        pass
    return PASSES * NUM / (time.perf_counter() - start)


def decode_rate(source: Source) -> float:
    """Images per second of JPEG decoding alone, by as many threads."""
    with ThreadPoolExecutor(WORKERS) as pool:
        start = time.perf_counter()
        list(pool.map(lambda i: decode_rgb(source.read(i), "").size, range(NUM)))
        return NUM / (time.perf_counter() - start)


def stage_times(source: Source) -> str:
    """Milliseconds an image of each stage, one thread."""
    recipe, spent = ViewRecipe(), Counter[str]()
    out = {
        size: np.empty((3, size, size), np.uint8) for size in (recipe.large_size, recipe.small_size)
    }

    def timed(stage: str, work: Callable[[], Any]) -> Any:
        start = time.perf_counter()
        result = work()
        spent[stage] += time.perf_counter() - start
        return result

    for index in range(NUM):
        image = timed("decode", lambda i=index: decode_rgb(source.read(i), ""))
        plan = timed("plan", lambda i=index, size=image.size: plan_views(0, 0, i, *size, recipe))
        whole = timed("planes", lambda image=image: fast.to_planes(image))
        for crop in plan.crops:
            target = out[crop.size]
            timed(
                "strong" if crop.strong else "weak",
                lambda c=crop, w=whole, t=target: fast.render_crop_compiled(w, c, t),
            )
    return ", ".join(f"{stage} {1000 * seconds / NUM:.1f}" for stage, seconds in spent.items())


def measure_lock(source: Source, loader: ViewLoader) -> dict[str, Any]:
    """Milliseconds of an image that need the interpreter's lock: in the trainer, and by the work
    itself, as if threads of the trainer did it. CPU times, so other processes do not show.
    """
    spent = Counter[str]()

    def timed(part: str, work: Callable[..., Any]) -> Callable[..., Any]:
        def call(*arguments: Any) -> Any:
            start = time.thread_time()
            result = work(*arguments)
            spent[part] += time.thread_time() - start
            return result

        return call

    # What runs without the lock: here logarithms of noise and copies of pixels, there the decoder
    # and compiled kernels.
    count = PASSES * NUM // BATCH
    copy = "mugs.data.loading.worker_pool.copy_pixels"
    for _ in loader.iterate(0, count):
        pass
    with (
        patch("mugs.data.loading.batch.box_muller", timed("free", box_muller)),
        patch(copy, timed("free", copy_pixels)),
    ):
        start = time.process_time()
        for _ in loader.iterate(0, count):
            pass
        held = time.process_time() - start - spent["free"]

    recipe = ViewRecipe()
    drawing = TrainingViews(recipe, 0, "fast", annotate_nothing)
    crops = drawing.sizes.split(np.empty(drawing.sizes.bytes_per_image, np.uint8), 1)
    with ExitStack() as stack:
        for name in ("erase", "fast", "geometry", "randaugment", "weak"):
            module = importlib.import_module(f"mugs.data.views.render.{name}")
            for key, kernel in list(vars(module).items()):
                if isinstance(kernel, Dispatcher):
                    stack.enter_context(patch.object(module, key, timed("kernels", kernel)))
        spent.clear()
        start = time.thread_time()
        for index in range(NUM):
            image = timed("kernels", decode_rgb)(source.read(index), "")
            drawing(image, Place(0, index, 0), crops)
        needed = time.thread_time() - start - spent["kernels"]
    return {
        "name": "loader_lock",
        "ours": 1000 * held / (PASSES * NUM),
        "baseline": 1000 * needed / NUM,
        "ratio": needed / NUM / (held / (PASSES * NUM)),
        "unit": "ms an image",
        "note": "CPU time that holds the trainer's interpreter lock; baseline: threads that draw",
    }


def run() -> list[dict[str, Any]]:
    """Rows {name, ours, baseline, ratio, unit, note}; loaders,
    workers and compiled code are warm.
    """
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder, ExitStack() as stack:
        root = Path(folder)
        photographs(root / "images")
        convert_to_beton(FolderSource(root / "images"), root / "train.beton")
        pack = BetonSource(root / "train.beton")
        plain = plain_loader(root / "images", BATCH, WORKERS, PASSES)
        ways: dict[str, Callable[[], Iterable[Any]]] = {
            "plain": lambda: plain,
            "loader_multicrop": ours(stack, open_source(root / "images"), "auto"),
        }
        if find_spec("ffcv"):
            ways["loader_multicrop_ffcv"] = ours(stack, pack, "ffcv")
        for batches in ways.values():
            rate(batches)
        rounds = [{name: rate(batches) for name, batches in ways.items()} for _ in range(ROUNDS)]
        stages = stage_times(pack)
        floor = median(decode_rate(pack) for _ in range(ROUNDS))
        lock = measure_lock(pack, make_warm_loader(stack, pack, "auto"))
    note = (
        f"14 crops, batch {BATCH}, {WORKERS} workers, "
        f"medians of {ROUNDS} interleaved rounds of {PASSES * NUM} images; "
        "baseline: torchvision, timm and PIL in a DataLoader, floats out (ours: bytes); "
        f"decoding alone {floor:.0f} img/s"
    )
    rows = [
        {
            "name": name,
            "ours": median(r[name] for r in rounds),
            "baseline": median(r["plain"] for r in rounds),
            "ratio": median(r[name] / r["plain"] for r in rounds),
            "unit": "img/s",
            "note": note,
        }
        for name in ways
        if name != "plain"
    ]
    return [
        *rows,
        lock,
        {**rows[0], "name": "loader_multicrop_full", "note": f"ms an image, one thread: {stages}"},
    ]
