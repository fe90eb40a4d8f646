"""A small `.beton` file and what the tests of both front ends do with it."""

import os
import threading
from contextlib import closing, suppress
from pathlib import Path
from typing import Any

import numpy as np
import torch
from example_annotations import annotate_image
from PIL import Image

from mugs.data.loading.batch import Batch
from mugs.data.loading.loader import make_loader
from mugs.data.loading.order import SampleOrder
from mugs.data.loading.worker_pool import find_server
from mugs.data.sources.beton import BetonSource
from mugs.data.sources.convert import convert_to_beton
from mugs.data.sources.folder import FolderSource
from mugs.data.views.config import ViewRecipe

RECIPE = ViewRecipe(large_size=32, small_size=16, num_small=2)
NUM, BATCH = 22, 4
FIELDS = ("large", "small", "ids", "labels")


def write_images(root: Path) -> Path:
    """`root/folder` with images of several sizes, and `root/train.beton` made of it."""
    rng = np.random.default_rng(0)
    for i in range(NUM):
        path = root / "folder" / str(i % 2) / f"{i:02d}.jpg"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(rng.integers(0, 255, (40 + i, 50, 3), dtype=np.uint8)).save(path)
    convert_to_beton(FolderSource(root / "folder"), root / "train.beton")
    return root / "train.beton"


def copy_of(path: Path, folder: Path) -> Path:
    """A `.beton` file and its sidecar, to be damaged."""
    for name in (path.name, f"{path.name}.json"):
        (folder / name).write_bytes((path.parent / name).read_bytes())
    return folder / path.name


def damage_image(path: Path, sample: int) -> None:
    """Zeros over the start of a stored image."""
    with path.open("r+b") as stream:
        stream.seek(int(BetonSource(path).samples["image"]["data_ptr"][sample]))
        stream.write(bytes(64))


def loader(path: Path, name: str, *, world: int = 1, rank: int = 0, **options: Any):
    source = BetonSource(path)
    order = SampleOrder(len(source), seed=3, world=world, rank=rank, batch_size=BATCH)
    options = {"annotate": annotate_image, **options}
    return closing(make_loader(source, RECIPE, order, seed=5, loader=name, **options))


def collect(path: Path, name: str, start: int = 0, stop: int = 12, **options: Any) -> list[Batch]:
    with loader(path, name, **options) as batches:
        return list(batches.iterate(start, stop))


def assert_same_batches(ours: list[Batch], theirs: list[Batch]) -> None:
    for a, b in zip(ours, theirs, strict=True):
        assert all(torch.equal(getattr(a, n), getattr(b, n)) for n in FIELDS)
        assert all(torch.equal(one, other) for one, other in zip(a.noise, b.noise, strict=True))
        assert a.extras.keys() == b.extras.keys()
        assert all(torch.equal(a.extras[n], b.extras[n]) for n in a.extras)
        assert (a.epoch, a.step) == (b.epoch, b.step)


def abandon(path: Path, name: str, repeats: int) -> int:
    """Begin iterators and leave them by an early break;
    bytes that the process grew by after the first tenth.
    """
    before = 0
    with loader(path, name) as batches:
        for repeat in range(repeats):
            for _ in batches.iterate(repeat, repeat + 30):
                break
            if repeat == repeats // 10:
                before = resident()
            assert threading.active_count() < 8
    return resident() - before


def working() -> list[str]:
    """Threads and processes of loaders that are still there."""
    threads = [
        t.name
        for t in threading.enumerate()
        if t.name.startswith("views") or type(t).__name__ == "ReadAhead"
    ]
    return threads + [f"process {pid}" for pid in list_workers()]


def list_workers() -> list[int]:
    """Worker processes of this process: the children of its server."""
    return children_of(find_server().process.pid)


def children_of(pid: int) -> list[int]:
    """Processes that a process has started and that were not waited for."""
    found = []
    for folder in Path("/proc").iterdir():
        with suppress(OSError):
            # Behind the name, which may hold spaces: state and parent.
            if (
                folder.name.isdecimal()
                and int((folder / "stat").read_text().rpartition(")")[2].split()[1]) == pid
            ):
                found.append(int(folder.name))
    return found


def resident() -> int:
    """Bytes of this process in memory."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
