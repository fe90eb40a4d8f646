"""What both front ends promise. FFCV: the same batches, and none of its side effects."""

import gc
import os
import re
import signal
import subprocess
import sys
import threading
from collections import Counter
from pathlib import Path
from types import FrameType
from typing import Any

import numpy as np
import pytest
from example_annotations import annotate_process, die, fail
from loader_cases import (
    BATCH,
    NUM,
    RECIPE,
    abandon,
    assert_same_batches,
    collect,
    copy_of,
    damage_image,
    list_workers,
    loader,
    working,
)
from PIL import Image

from mugs.data.loading.batch import Batch
from mugs.data.loading.loader import make_loader
from mugs.data.loading.order import SampleOrder
from mugs.data.loading.worker import IGNORED_SIGNALS
from mugs.data.loading.worker_pool import WorkerError, find_server
from mugs.data.sources.base import SourceError
from mugs.data.sources.beton import HEADER, BetonSource
from mugs.data.sources.convert import convert_to_beton
from mugs.data.sources.decode import DecodeError
from mugs.data.sources.folder import FolderSource

pytest.importorskip("ffcv", reason="ffcv is not installed")


@pytest.mark.parametrize("threads", [1, 3])
def test_same_batches_as_the_thread_loader(beton: Path, threads: int) -> None:
    """Over three epochs of five batches, from the start and from the middle of an epoch."""
    expected = collect(beton, "thread")
    assert_same_batches(collect(beton, "ffcv", threads=threads), expected)
    assert_same_batches(collect(beton, "ffcv", start=7, threads=threads), expected[7:])


def test_resume_at_every_step(beton: Path) -> None:
    expected = collect(beton, "thread")
    with loader(beton, "ffcv") as batches:
        for start in range(12):
            assert_same_batches(
                list(batches.iterate(start, min(start + 2, 12))), expected[start : start + 2]
            )


@pytest.mark.parametrize("ahead", [1, 8])
def test_kept_batches_do_not_change(beton: Path, ahead: int) -> None:
    """FFCV hands out a few buffers in turn; ours are no views of them."""
    assert_same_batches(collect(beton, "ffcv", ahead=ahead), collect(beton, "thread"))


def test_ranks_share_the_global_batch(beton: Path) -> None:
    for rank in (0, 1):
        assert_same_batches(
            collect(beton, "ffcv", world=2, rank=rank), collect(beton, "thread", world=2, rank=rank)
        )


def test_repeated_samples(beton: Path) -> None:
    """More steps than the data fill: a batch holds a sample twice."""

    def padded(name: str) -> list[Batch]:
        order = SampleOrder(NUM, seed=3, world=1, rank=0, batch_size=32, steps_per_epoch=2)
        batches = make_loader(BetonSource(beton), RECIPE, order, seed=5, loader=name)
        found = list(batches.iterate(0, 3))
        batches.close()
        return found

    assert_same_batches(padded("ffcv"), padded("thread"))


@pytest.mark.slow
def test_threads_of_the_process_are_left_alone(beton: Path) -> None:
    """In a fresh process, because importing ffcv is what sets them."""
    code = """
import sys; sys.path[:0] = [".", "tests/unit/data"]
import torch; torch.set_num_threads(2)
from pathlib import Path; from loader_cases import collect
assert "ffcv" not in sys.modules
collect(Path(sys.argv[1]), "ffcv", stop=2)
assert "ffcv" in sys.modules
sys.exit(torch.get_num_threads() != 2)
"""
    root = Path(__file__).parents[3]
    done = subprocess.run(
        [sys.executable, "-c", code, str(beton)], cwd=root, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr


def test_folders_are_refused(beton: Path) -> None:
    source = FolderSource(beton.parent / "folder")
    order = SampleOrder(len(source), seed=0, world=1, rank=0, batch_size=BATCH)
    with pytest.raises(SourceError, match="convert the folder, or use loader: thread"):
        make_loader(source, RECIPE, order, seed=0, loader="ffcv")


def test_a_damaged_table_is_refused(beton: Path, tmp_path: Path) -> None:
    path = copy_of(beton, tmp_path)
    with path.open("r+b") as stream:
        stream.seek(
            int(np.fromfile(path, dtype=HEADER, count=1)["alloc_table_ptr"][0]) + 5 * 24 + 8
        )
        stream.write(b"\xff" * 7)
    with pytest.raises(SourceError, match="table of images is damaged"):
        collect(path, "ffcv")


def test_an_error_of_the_reader_surfaces_at_once(
    beton: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from mugs.data.loading.ffcv_loader import ReadAhead

    stock = ReadAhead.run_pipeline

    def fail(self: Any, number: int, *_: Any) -> Any:
        if number == 2:
            raise OSError("stale file handle")
        return stock(self, number, *_)

    monkeypatch.setattr(ReadAhead, "run_pipeline", fail)
    with pytest.raises(OSError, match="stale"):
        collect(beton, "ffcv")
    assert not working()


def test_buffers_do_not_grow_with_the_largest_image(tmp_path: Path) -> None:
    from mugs.data.loading.ffcv_loader import ReadAhead, make_reader

    (tmp_path / "folder/a").mkdir(parents=True)
    for i, size in enumerate([(40, 30), (2000, 1500)]):
        Image.effect_noise(size, 50).convert("RGB").save(tmp_path / f"folder/a/{i}.jpg")
    convert_to_beton(FolderSource(tmp_path / "folder"), tmp_path / "x.beton")
    reading = ReadAhead(make_reader(BetonSource(tmp_path / "x.beton"), 2), [np.array([1, 0])])
    assert (
        sum(m.nbytes for m in reading.memory_allocations["operation"].values() if m is not None)
        < 1000
    )
    assert [int(size) for size in next(reading)[:, 1]] == BetonSource(tmp_path / "x.beton").sizes[
        ::-1
    ]
    reading.close()


def test_stock_ffcv_and_other_compiled_code_still_work(beton: Path) -> None:
    """FFCV's own memory manager changes types that the whole process shares;
    ours is used by our loader alone.
    """
    from ffcv.fields.basics import IntDecoder
    from ffcv.loader import Loader, OrderOption
    from ffcv.memory_managers import OSCacheManager
    from numba import njit, uint8

    for _ in range(2):
        key = hash(uint8[::1])
        collect(beton, "ffcv", stop=1)
        assert hash(uint8[::1]) == key
        assert njit(lambda a: a.sum())(np.ones(5, dtype=np.uint8)) == 5
    pipelines = {"image": None, "label": [IntDecoder()]}
    stock = Loader(
        str(beton), batch_size=2, num_workers=1, order=OrderOption.SEQUENTIAL, pipelines=pipelines
    )
    assert type(stock.memory_manager) is OSCacheManager
    assert [int(x) for (labels,) in stock for x in labels.flatten()] == [
        BetonSource(beton).label(i) for i in range(NUM)
    ]


@pytest.fixture(params=["thread", "ffcv"])
def name(request: pytest.FixtureRequest) -> str:
    if request.param == "ffcv":
        pytest.importorskip("ffcv", reason="ffcv is not installed")
    return str(request.param)


def test_a_damaged_image_is_named_where_it_is_due(beton: Path, tmp_path: Path, name: str) -> None:
    path = copy_of(beton, tmp_path)
    damage_image(path, 9)
    order = SampleOrder(NUM, seed=3, world=1, rank=0, batch_size=BATCH)
    due = next(step for step in range(5) if 9 in order.indices(step))
    assert due > 0
    with loader(path, name) as batches:
        iterator = batches.iterate(0, 5)
        for _ in range(due):
            next(iterator)
        with pytest.raises(DecodeError, match=r"train\.beton: sample 9 \(0/18\.jpg\)"):
            next(iterator)
    assert not working()


def test_an_error_while_rendering_surfaces(beton: Path, name: str) -> None:
    with loader(beton, name, annotate=fail) as batches:
        with pytest.raises(ZeroDivisionError) as caught:
            next(batches.iterate(0, 5))
        # The lines of the worker, as the trainer's say nothing.
        assert "example_annotations.py" in caught.value.__notes__[0]
    assert not working()


def test_closing_ends_iterators_that_are_still_there(beton: Path, name: str) -> None:
    with loader(beton, name) as batches:
        iterator = batches.iterate(0, 30)
        next(iterator)
    assert not working()
    with pytest.raises(RuntimeError):
        next(iterator)


@pytest.mark.parametrize("repeats", [50, pytest.param(200, marks=pytest.mark.long)])
def test_abandoned_iterators_leave_nothing(beton: Path, name: str, repeats: int) -> None:
    assert abandon(beton, name, repeats) < 20e6
    assert not working()


def test_a_file_that_shrinks_while_it_is_read(beton: Path, tmp_path: Path) -> None:
    """No bus error: the sample is named. FFCV reads through a memory map and has no such guard."""
    path = copy_of(beton, tmp_path)
    source = BetonSource(path)
    os.truncate(path, int(source.samples["image"]["data_ptr"][4]))
    order = SampleOrder(len(source), seed=3, world=1, rank=0, batch_size=BATCH)
    batches = make_loader(source, RECIPE, order, seed=5)
    with pytest.raises(DecodeError, match="sample"):
        list(batches.iterate(0, 5))
    batches.close()


def test_ffcv_missing_is_one_message(beton: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delitem(sys.modules, "mugs.data.loading.ffcv_loader", raising=False)
    monkeypatch.setitem(sys.modules, "ffcv", None)
    with pytest.raises(
        ValueError,
        match=r"loader 'ffcv': .*ffcv.*; install the extra 'ffcv'.* or use loader: thread",
    ):
        collect(beton, "ffcv")
    assert len(collect(beton, "auto", stop=2)) == 2


def test_images_are_drawn_in_processes_of_their_own(beton: Path, name: str) -> None:
    """By as many as were asked for, each as often as the others; in every epoch by the same."""
    with loader(beton, name, threads=3, annotate=annotate_process) as batches:
        drawn = Counter[int]()
        for batch in batches.iterate(0, 12):
            drawn.update(batch.extras["process"].tolist())
        assert sorted(drawn) == sorted(list_workers())
    assert os.getpid() not in drawn
    assert list(drawn.values()) == [16, 16, 16]


def test_no_thread_of_the_trainer_runs_code_that_plans_or_renders(beton: Path, name: str) -> None:
    """So nothing of it can hold the interpreter's lock, whatever the number of workers."""
    entered: set[str] = set()

    def watch(frame: FrameType, event: str, _: object) -> None:
        if event == "call":
            entered.add(frame.f_code.co_filename)

    threading.setprofile(watch)
    sys.setprofile(watch)
    try:
        collect(beton, name, stop=6)
    finally:
        sys.setprofile(None)
        threading.setprofile(None)
    ours = {path.rpartition("/mugs/data/")[2] for path in entered if "/mugs/data/" in path}
    assert "loading/view_loader.py" in ours
    assert not [path for path in ours if re.match("views/(plan|render)|.*decode", path)]


def test_a_worker_that_was_killed_is_named(beton: Path, name: str) -> None:
    with loader(beton, name, threads=2) as batches:
        iterator = batches.iterate(0, 30)
        next(iterator)
        killed = list_workers()[1]
        os.kill(killed, signal.SIGKILL)
        words = rf"loader worker 2 of 2 \(process {killed}\) was killed by SIGKILL; perhaps for"
        with pytest.raises(WorkerError, match=words):
            list(iterator)
        # A new iterator needs the worker too.
        with pytest.raises(WorkerError, match=words):
            next(batches.iterate(0, 5))
    assert not working()


def test_a_worker_that_dies_of_an_image_is_named(beton: Path, name: str) -> None:
    with (
        loader(beton, name, annotate=die) as batches,
        pytest.raises(WorkerError, match="was killed by SIGKILL"),
    ):
        next(batches.iterate(0, 5))
    assert not working()


def test_signals_to_stop_do_not_end_workers(beton: Path, name: str) -> None:
    """Slurm and a terminal send them to all processes; the trainer still takes its step."""
    with loader(beton, name, threads=2) as batches:
        iterator = batches.iterate(0, 12)
        next(iterator)
        for pid in (find_server().process.pid, *list_workers()):
            for number in IGNORED_SIGNALS:
                os.kill(pid, number)
        assert len(list(iterator)) == 11


def test_loaders_leave_no_files_open(beton: Path, name: str) -> None:
    collect(beton, name, stop=2)
    before = len(os.listdir("/proc/self/fd"))
    for _ in range(5):
        collect(beton, name, stop=2)
    gc.collect()
    # FFCV keeps a map of the data for some time.
    assert len(os.listdir("/proc/self/fd")) <= before + 2


@pytest.mark.slow
def test_workers_end_with_a_trainer_that_was_killed(beton: Path, name: str) -> None:
    code = """
import sys; sys.path[:0] = [".", "tests/unit/data"]
from pathlib import Path; from loader_cases import loader, list_workers
import os
with loader(Path(sys.argv[1]), sys.argv[2]) as batches:
    next(batches.iterate(0, 12))
    print(*list_workers(), flush=True)
    os.kill(os.getpid(), 9)
"""
    root = Path(__file__).parents[3]
    done = subprocess.run(
        [sys.executable, "-c", code, str(beton), name], cwd=root, capture_output=True, text=True
    )
    # `run` returns when the last process that has the pipe of the output, a worker too, has ended.
    workers = done.stdout.split()
    assert done.returncode == -signal.SIGKILL and len(workers) == 2
    # What is left may be a zombie, where nothing waits for orphans.
    assert not [pid for pid in workers if Path(f"/proc/{pid}/exe").exists()]
