"""Training crops of scenes in batches, and test images one by one."""

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
    """A test image: network input (3, h, w), pixels uint8 (3, H, W), label map (H, W), number."""

    view: Tensor
    picture: Tensor
    labels: Tensor
    sample: int


def load_training_crop(
    scenes: SceneFolder, recipe: SceneRecipe, seed: int, draw: tuple[int, int]
) -> tuple[Tensor, Tensor, int]:
    """Return the crop, label map and sample number of a draw, which is (epoch, sample)."""
    epoch, sample = draw
    image, labels = scenes.read(sample)
    return *render_training_crop(
        image, labels, seed=seed, epoch=epoch, sample=sample, recipe=recipe
    ), sample


def load_scene(scenes: SceneFolder, recipe: SceneRecipe, index: int) -> Scene:
    """Return the test image of this number."""
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
    """Yield this rank's batches of steps start ... stop - 1.

    They are made by `workers` processes, or by this one if that is 0. What a scene raised is raised
    when its batch is due.
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
    """Yield scenes in the order of `indices`; raise what a scene raised."""
    # A batch of one: test images have different sizes.
    return iter_batches(
        partial(load_scene, scenes, recipe), ([index] for index in indices), itemgetter(0), workers
    )
