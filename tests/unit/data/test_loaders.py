"""What both front ends promise: errors surface where they are due, threads end, memory stays."""

import os
import sys
from pathlib import Path

import pytest
from loader_cases import (
    BATCH,
    NUM,
    RECIPE,
    abandon,
    collect,
    copy_of,
    damage_image,
    loader,
    working,
)

from mugs.data.loading import thread_loader
from mugs.data.loading.loader import make_loader
from mugs.data.loading.order import SampleOrder
from mugs.data.sources.beton import BetonSource
from mugs.data.sources.decode import DecodeError


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


def test_an_error_while_rendering_surfaces(
    beton: Path, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object) -> None:
        raise ZeroDivisionError("in a thread")

    monkeypatch.setattr(thread_loader, "plan_views", fail)
    with loader(beton, name) as batches, pytest.raises(ZeroDivisionError):
        next(batches.iterate(0, 5))
    assert not working()


def test_closing_ends_iterators_that_are_still_there(beton: Path, name: str) -> None:
    with loader(beton, name) as batches:
        iterator = batches.iterate(0, 30)
        next(iterator)
    assert not working()
    with pytest.raises(RuntimeError):
        next(iterator)


@pytest.mark.parametrize("repeats", [50, pytest.param(200, marks=pytest.mark.slow)])
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
