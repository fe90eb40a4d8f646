"""Scenes by the batch: training crops in the exact order of `SampleOrder`, test inputs one by one."""

from collections.abc import Generator, Sequence
from functools import partial
from operator import itemgetter
from typing import NamedTuple

from torch import Tensor

from mugs.data.dense.ade20k import SceneFolder
from mugs.data.loading.order import SampleOrder
from mugs.data.loading.worker_batches import LabeledBatch, iter_batches, stack_samples
from mugs.transfer.segmentation.config import SceneRecipe
from mugs.transfer.segmentation.views import render_test_view, render_training_crop


class Scene(NamedTuple):
    """A test image: its input (3, h, w), the picture uint8 (3, H, W), the label map (H, W), its number."""

    view: Tensor
    picture: Tensor
    labels: Tensor
    sample: int


def load_training_crop(
    scenes: SceneFolder, recipe: SceneRecipe, seed: int, draw: tuple[int, int]
) -> tuple[Tensor, Tensor, int]:
    """The crop, label map and number of a draw, which is epoch and sample."""
    epoch, sample = draw
    image, labels = scenes.read(sample)
    return *render_training_crop(
        image, labels, seed=seed, epoch=epoch, sample=sample, recipe=recipe
    ), sample


def load_scene(scenes: SceneFolder, recipe: SceneRecipe, index: int) -> Scene:
    """The test image of this number."""
    image, labels = scenes.read(index)
    return Scene(render_test_view(image, recipe), image, labels, index)


def iter_training_batches(
    scenes: SceneFolder,
    recipe: SceneRecipe,
    order: SampleOrder,
    *,
    seed: int,
    start: int,
    stop: int,
    workers: int,
) -> Generator[LabeledBatch]:
    """This rank's batches of steps start ... stop - 1, made by `workers` processes, or by this one with 0.

    Raises what a scene raised, where its batch is due.
    """
    draws = (
        [(step // order.steps_per_epoch, int(sample)) for sample in order.indices(step)]
        for step in range(start, stop)
    )
    return iter_batches(
        partial(load_training_crop, scenes, recipe, seed), draws, stack_samples, workers
    )


def iter_scenes(
    scenes: SceneFolder, recipe: SceneRecipe, indices: Sequence[int], *, workers: int
) -> Generator[Scene]:
    """Scenes in the order of `indices`. Raises what a scene raised."""
    return iter_batches(
        partial(load_scene, scenes, recipe), ([index] for index in indices), itemgetter(0), workers
    )
