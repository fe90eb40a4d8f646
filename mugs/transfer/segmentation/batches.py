"""Scenes by the batch: training crops in the exact order of `Order`, test inputs one by one."""

from collections.abc import Generator, Iterable, Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from mugs.data.decode import DecodeError
from mugs.data.order import Order
from mugs.data.source import SourceError
from mugs.transfer.segmentation.recipe import SceneRecipe
from mugs.transfer.segmentation.scenes import SceneFolder
from mugs.transfer.segmentation.views import training_view, whole_view

Draw = tuple[int, int]  # epoch, sample
BAD = (DecodeError, SourceError, OSError)


class Batch(NamedTuple):
    """Crops (N, 3, S, S), label maps (N, S, S) and sample ids (N,) of one rank."""

    images: Tensor
    labels: Tensor
    ids: Tensor


class Scene(NamedTuple):
    """A test image: its input (3, h, w), the picture uint8 (3, H, W), the label map (H, W), its number."""

    view: Tensor
    picture: Tensor
    labels: Tensor
    sample: int


class Crops(Dataset[Any]):
    """Training crops by draw. A scene that cannot be read comes back as its error, to be raised when it is due."""

    def __init__(self, scenes: SceneFolder, recipe: SceneRecipe, seed: int) -> None:
        self.scenes, self.recipe, self.seed = scenes, recipe, seed

    def __getitem__(self, draw: Draw) -> tuple[Tensor, Tensor, int] | Exception:
        epoch, sample = draw
        try:
            image, labels = self.scenes.read(sample)
        except BAD as error:
            return error
        view, target = training_view(image, labels, seed=self.seed, epoch=epoch, sample=sample, recipe=self.recipe)
        return view, target, sample


class Wholes(Dataset[Any]):
    """Test inputs by index, or the error."""

    def __init__(self, scenes: SceneFolder, recipe: SceneRecipe) -> None:
        self.scenes, self.recipe = scenes, recipe

    def __getitem__(self, index: int) -> Scene | Exception:
        try:
            image, labels = self.scenes.read(index)
        except BAD as error:
            return error
        return Scene(whole_view(image, self.recipe), image, labels, index)


def training_batches(
    scenes: SceneFolder, recipe: SceneRecipe, order: Order, *, seed: int, start: int, stop: int, workers: int
) -> Generator[Batch]:
    """This rank's batches of steps start ... stop - 1, made by `workers` processes, or by this one with 0.

    Raises what a scene raised, where its batch is due.
    """
    draws = (
        [(step // order.steps_per_epoch, int(sample)) for sample in order.indices(step)] for step in range(start, stop)
    )
    return _made(Crops(scenes, recipe, seed), draws, stacked, workers)


def whole_scenes(scenes: SceneFolder, recipe: SceneRecipe, indices: Sequence[int], *, workers: int) -> Iterator[Scene]:
    """Scenes in the order of `indices`. Raises what a scene raised."""
    return _made(Wholes(scenes, recipe), ([index] for index in indices), _only, workers)


def _made(dataset: Dataset[Any], keys: Iterable[Any], collate: Any, workers: int) -> Generator[Any]:
    loader = DataLoader(
        dataset,
        batch_sampler=keys,
        num_workers=workers,
        collate_fn=collate,
        pin_memory=torch.cuda.is_available(),
        multiprocessing_context="fork" if workers else None,
    )
    for made in loader:
        if isinstance(made, Exception):
            raise made
        yield made


def stacked(items: Sequence[tuple[Tensor, Tensor, int] | Exception]) -> Batch | Exception:
    """Stacked crops and label maps, or the first error."""
    good = [item for item in items if not isinstance(item, Exception)]
    if len(good) < len(items):
        return next(item for item in items if isinstance(item, Exception))
    views, labels, ids = zip(*good, strict=True)
    return Batch(torch.stack(views), torch.stack(labels), torch.tensor(ids))


def _only(items: Sequence[Any]) -> Any:
    return items[0]
