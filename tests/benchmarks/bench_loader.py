"""Multi-crop loaders against the plain way: torchvision and PIL transforms of whole images in a DataLoader."""

import io
import random
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageFilter
from timm.data.auto_augment import rand_augment_transform
from timm.data.random_erasing import RandomErasing
from torch import Tensor
from torch.utils.data import DataLoader, Dataset
from torchvision import transforms as T

from mugs.data.beton import PackSource
from mugs.data.convert import convert_folder
from mugs.data.decode import decode_rgb
from mugs.data.loader import LoaderName, make_loader
from mugs.data.order import Order
from mugs.data.recipe import IMAGENET_MEAN, IMAGENET_STD, ViewRecipe
from mugs.data.source import FolderSource, Source

NUM, BATCH, WORKERS, ROUNDS = 96, 16, 2, 5
BICUBIC = T.InterpolationMode.BICUBIC


def photographs(root: Path) -> None:
    """Smooth noise with grain, 500 x 375, quality 90: files of about the size ImageNet's have."""
    rng = np.random.default_rng(0)
    (root / "a").mkdir(parents=True)
    for i in range(NUM):
        coarse = Image.fromarray(rng.integers(0, 255, (94, 125, 3), dtype=np.uint8))
        smooth = np.asarray(coarse.resize((500, 375), Image.Resampling.BICUBIC)).astype(int)
        image = Image.fromarray((smooth + rng.normal(0, 6, smooth.shape)).clip(0, 255).astype(np.uint8))
        image.save(root / f"a/{i:03d}.jpg", quality=90)


class PlainViews:
    """The 14 views of the recipe from off-the-shelf transforms, one image at a time."""

    def __init__(self) -> None:
        jitter = T.RandomApply([T.ColorJitter(0.4, 0.4, 0.2, 0.1)], p=0.8)
        color = [T.RandomHorizontalFlip(), jitter, T.RandomGrayscale(0.2)]
        finish = [T.ToTensor(), T.Normalize(IMAGENET_MEAN, IMAGENET_STD)]

        def crop(size: int, scale: tuple[float, float]) -> T.RandomResizedCrop:
            return T.RandomResizedCrop(size, scale, interpolation=BICUBIC)

        def blur(probability: float) -> T.RandomApply:
            return T.RandomApply([lambda x: x.filter(ImageFilter.GaussianBlur(random.uniform(0.1, 2.0)))], probability)

        large, small = (224, (0.25, 1.0)), (96, (0.05, 0.25))
        fill = tuple(round(255 * m) for m in IMAGENET_MEAN)
        augment = guarded(rand_augment_transform("rand-m9-n2-mstd0.5-inc1", {"img_mean": fill}))
        erase = RandomErasing(0.25, mode="pixel", device="cpu")
        self.weak = [
            T.Compose([crop(*large), *color, blur(1.0), *finish]),
            T.Compose([crop(*large), *color, blur(0.1), T.RandomSolarize(128, 0.2), *finish]),
        ]
        self.weak_small = T.Compose([crop(*small), *color, blur(0.5), *finish])
        self.strong, self.strong_small = (
            T.Compose([T.RandomHorizontalFlip(), augment, crop(*size), *finish, erase]) for size in (large, small)
        )

    def __call__(self, image: Image.Image) -> list[Tensor]:
        student = self.weak if random.random() < 0.5 else [self.strong, self.strong]
        small = [self.weak_small if random.random() < 0.5 else self.strong_small for _ in range(10)]
        return [transform(image) for transform in (*self.weak, *student, *small)]


def guarded(augment: Callable[[Image.Image], Image.Image]) -> Callable[[Image.Image], Image.Image]:
    """Pillow 13 refuses to posterize to 0 bits, which the policy asks for now and then; draw again."""

    def apply(image: Image.Image) -> Image.Image:
        while True:
            try:
                return augment(image)
            except ValueError:
                continue

    return apply


class Plain(Dataset[list[Tensor]]):
    """A folder of images through `PlainViews`."""

    def __init__(self, source: FolderSource) -> None:
        self.source, self.views = source, PlainViews()

    def __len__(self) -> int:
        return len(self.source)

    def __getitem__(self, index: int) -> list[Tensor]:
        return self.views(Image.open(io.BytesIO(self.source.read(index))).convert("RGB"))


def speed(consume: Callable[[], object]) -> float:
    """Images per second."""
    start = time.perf_counter()
    consume()
    return NUM / (time.perf_counter() - start)


def ours(source: Source, name: LoaderName) -> Callable[[], None]:
    """One epoch through a loader that is made once, as in training."""
    order = Order(NUM, seed=0, world=1, rank=0, batch_size=BATCH)
    loader = make_loader(source, ViewRecipe(), order, seed=0, loader=name, threads=WORKERS)

    def epoch() -> None:
        for _ in loader.iterate(0, NUM // BATCH):
            pass

    epoch()
    return epoch


def run() -> list[dict[str, Any]]:
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        photographs(root / "images")
        convert_folder(root / "images", root / "train.beton")
        source, pack = FolderSource(root / "images"), PackSource(root / "train.beton")
        plain = DataLoader(Plain(source), batch_size=BATCH, num_workers=WORKERS, persistent_workers=True)
        ways: dict[str, Callable[[], object]] = {
            "loader_multicrop": ours(source, "thread"),
            "loader_multicrop_ffcv": ours(pack, "ffcv"),
            "plain": lambda: [None for _ in plain],
            "decode": lambda: [decode_rgb(source.read(i), "") for i in range(NUM)],
        }
        ways["plain"]()
        rounds = [{name: speed(way) for name, way in ways.items()} for _ in range(ROUNDS)]
    middle = {name: median(r[name] for r in rounds) for name in ways}
    note = f"14 crops of 500 x 375 JPEGs, {WORKERS} workers; decoding alone, one thread: {middle['decode']:.0f} img/s"
    return [
        {
            "name": name,
            "ours": middle[name],
            "baseline": middle["plain"],
            "ratio": median(r[name] / r["plain"] for r in rounds),
            "unit": "img/s",
            "note": note,
        }
        for name in ("loader_multicrop", "loader_multicrop_ffcv")
    ]
