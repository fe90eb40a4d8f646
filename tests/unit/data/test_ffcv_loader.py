"""The FFCV front end: the thread loader's batches, bit by bit; errors surface and threads end."""

import os
import threading
import time
from contextlib import closing
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from mugs.data.beton import PackSource
from mugs.data.convert import convert_folder
from mugs.data.decode import DecodeError
from mugs.data.loader import Batch, make_loader
from mugs.data.order import Order
from mugs.data.recipe import ViewRecipe
from mugs.data.source import FolderSource, SourceError

pytest.importorskip("ffcv", reason="ffcv is not installed")
RECIPE = ViewRecipe(large_size=32, small_size=16, num_small=2)
NUM, BATCH = 22, 4


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("images")
    rng = np.random.default_rng(0)
    for i in range(NUM):
        path = root / "folder" / str(i % 2) / f"{i:02d}.jpg"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(rng.integers(0, 255, (40 + i, 50, 3), dtype=np.uint8)).save(path)
    convert_folder(root / "folder", root / "train.beton")
    return root


def loader(path: Path, name: str, *, world: int = 1, rank: int = 0, **options: Any):
    source = PackSource(path)
    order = Order(len(source), seed=3, world=world, rank=rank, batch_size=BATCH)
    return closing(make_loader(source, RECIPE, order, seed=5, loader=name, **options))


def collect(path: Path, name: str, start: int = 0, stop: int = 12, **options: Any) -> list[Batch]:
    with loader(path, name, **options) as batches:
        return list(batches.iterate(start, stop))


def assert_same(ours: list[Batch], theirs: list[Batch]) -> None:
    for a, b in zip(ours, theirs, strict=True):
        assert all(
            torch.equal(getattr(a, n), getattr(b, n)) for n in ("large", "small", "erase", "weak", "ids", "labels")
        )
        assert (a.epoch, a.step) == (b.epoch, b.step)


@pytest.mark.parametrize("threads", [1, 3])
def test_same_batches_as_the_thread_loader(folder: Path, threads: int) -> None:
    """Over three epochs of five batches, from the start and from the middle of an epoch."""
    path = folder / "train.beton"
    expected = collect(path, "thread")
    assert_same(collect(path, "ffcv", threads=threads), expected)
    assert_same(collect(path, "ffcv", start=7, threads=threads), expected[7:])


def test_ranks_share_the_global_batch(folder: Path) -> None:
    path = folder / "train.beton"
    for rank in (0, 1):
        assert_same(collect(path, "ffcv", world=2, rank=rank), collect(path, "thread", world=2, rank=rank))


def test_threads_of_the_process_are_left_alone(folder: Path) -> None:
    before = torch.get_num_threads()
    collect(folder / "train.beton", "ffcv", stop=2)
    assert torch.get_num_threads() == before


def test_folders_are_refused(folder: Path) -> None:
    source = FolderSource(folder / "folder")
    order = Order(len(source), seed=0, world=1, rank=0, batch_size=BATCH)
    with pytest.raises(SourceError, match="convert the folder"):
        make_loader(source, RECIPE, order, seed=0, loader="ffcv")


def test_a_damaged_image_is_named(folder: Path, tmp_path: Path) -> None:
    path = tmp_path / "train.beton"
    for name in ("train.beton", "train.beton.json"):
        (tmp_path / name).write_bytes((folder / name).read_bytes())
    offset = int(PackSource(path).samples["image"]["data_ptr"][9])
    with path.open("r+b") as stream:
        stream.seek(offset)
        stream.write(bytes(64))
    with pytest.raises(DecodeError, match="sample 9"):
        collect(path, "ffcv")
    assert not working()


def test_an_error_of_the_reader_surfaces_at_once(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from mugs.data.ffcv_loader import ReadAhead

    def fail(self: Any, number: int, *_: Any) -> Any:
        if number == 2:
            raise OSError("stale file handle")
        return stock(self, number, *_)

    stock = ReadAhead.run_pipeline
    monkeypatch.setattr(ReadAhead, "run_pipeline", fail)
    start = time.monotonic()
    with pytest.raises(OSError, match="stale"):
        collect(folder / "train.beton", "ffcv")
    assert time.monotonic() - start < 30  # it used to wait for ever
    assert not working()


@pytest.mark.parametrize("name", ["thread", "ffcv"])
def test_abandoned_epochs_leave_nothing(folder: Path, name: str) -> None:
    """200 iterators, each left after one batch: no thread stays, memory does not grow."""
    with loader(folder / "train.beton", name) as batches:
        for repeat in range(200):
            iterator = batches.iterate(repeat, repeat + 30)
            next(iterator)
            iterator.close()
            if repeat == 20:
                before = resident()
        assert threading.active_count() < 8
        assert resident() - before < 50e6
    assert not working()


def working() -> list[str]:
    """Threads of loaders that are still there."""
    return [t.name for t in threading.enumerate() if t.name.startswith("views") or type(t).__name__ == "ReadAhead"]


def resident() -> int:
    """Bytes of this process in memory."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
