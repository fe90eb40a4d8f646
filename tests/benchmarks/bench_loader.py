"""Multi-crop loader against the plain way: torchvision-style PIL transforms on whole images in a DataLoader."""

import io
import tempfile
import time
from contextlib import closing
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader, Dataset
from torchvision.transforms.v2.functional import pil_to_tensor

from mugs.data.loader import make_loader
from mugs.data.order import Order
from mugs.data.plan import draw_plan
from mugs.data.recipe import ViewRecipe
from mugs.data.render.reference import render_crop
from mugs.data.source import FolderSource

NUM, BATCH, WORKERS = 64, 16, 2


def photographs(root: Path) -> None:
    """Smooth noise, 500 x 375, quality 90: files of the size ImageNet's have."""
    rng = np.random.default_rng(0)
    (root / "a").mkdir(parents=True)
    for i in range(NUM):
        small = Image.fromarray(rng.integers(0, 255, (94, 125, 3), dtype=np.uint8))
        image = small.resize((500, 375), Image.Resampling.BICUBIC)
        image.save(root / f"a/{i:03d}.jpg", quality=90)


class Plain(Dataset[list[Tensor]]):
    """One sample at a time: floats out, normalised in the worker."""

    def __init__(self, source: FolderSource, recipe: ViewRecipe) -> None:
        self.source, self.recipe = source, recipe

    def __len__(self) -> int:
        return NUM

    def __getitem__(self, index: int) -> list[Tensor]:
        image = Image.open(io.BytesIO(self.source.read(index))).convert("RGB")
        mean, std = (torch.tensor(v).view(3, 1, 1) for v in (self.recipe.mean, self.recipe.std))
        plan = draw_plan(0, 0, index, image.width, image.height, self.recipe)
        return [(pil_to_tensor(render_crop(image, c)).float() / 255 - mean) / std for c in plan.crops]


def run() -> list[dict[str, Any]]:
    torch.set_num_threads(1)
    recipe = ViewRecipe()
    with tempfile.TemporaryDirectory() as folder:
        photographs(Path(folder))
        source = FolderSource(Path(folder))
        order = Order(NUM, seed=0, world=1, rank=0, batch_size=BATCH)

        def ours() -> float:
            start = time.perf_counter()
            with closing(make_loader(source, recipe, order, seed=0, threads=WORKERS)) as loader:
                for _ in loader.iterate(0, NUM // BATCH):
                    pass
            return NUM / (time.perf_counter() - start)

        def plain() -> float:
            start = time.perf_counter()
            for _ in DataLoader(Plain(source, recipe), batch_size=BATCH, num_workers=WORKERS):
                pass
            return NUM / (time.perf_counter() - start)

        pairs = [(ours(), plain()) for _ in range(3)]
    mine, theirs = median(p[0] for p in pairs), median(p[1] for p in pairs)
    note = f"14 crops, {WORKERS} workers, PIL reference renderer on both sides; medians of 3"
    ratio = median(a / b for a, b in pairs)
    return [
        {"name": "loader_multicrop", "ours": mine, "baseline": theirs, "ratio": ratio, "unit": "img/s", "note": note}
    ]
