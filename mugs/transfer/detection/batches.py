"""Which images are trained on together, and getting them ready ahead of the loop."""

from collections.abc import Generator, Sequence
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
from torch import Tensor

from mugs.data.dense.coco import CocoSplit
from mugs.data.dense.pixels import normalize_pixels
from mugs.data.loading.order import EPOCHS_KEPT
from mugs.data.prefetch import map_prefetched
from mugs.random_streams import (
    EpochStream,
    SampleStream,
    make_generator,
    make_image_key,
    make_item_generator,
)
from mugs.transfer.detection.config import Scales
from mugs.transfer.detection.targets import Targets
from mugs.transfer.detection.views import apply_view_plan, draw_view_plan, pad_batch


class AspectGroupedOrder:
    """Passes of `images_per_pass` images that are all wide or all not, shuffled by (seed, epoch).

    What is padded to a common size and sent through the network together does not depend on the number of ranks. Images
    are repeated to fill the last pass of either kind and the last batch.
    """

    def __init__(
        self,
        wide: Sequence[bool],
        *,
        seed: int,
        world: int,
        rank: int,
        batch_size: int,
        images_per_pass: int,
    ) -> None:
        if batch_size % (world * images_per_pass):
            raise ValueError(
                f"batch_size {batch_size} does not divide over {world} ranks into passes of {images_per_pass} images"
            )
        if not len(wide):
            raise ValueError("no image to train on")
        self.groups = [np.flatnonzero(np.asarray(wide) == kind) for kind in (False, True)]
        self.seed, self.world, self.rank, self.size = seed, world, rank, images_per_pass
        self.passes_per_step = batch_size // images_per_pass
        passes = sum(-(-len(group) // images_per_pass) for group in self.groups)
        self.steps_per_epoch = -(-passes // self.passes_per_step)
        self.permutation = lru_cache(EPOCHS_KEPT)(self._permutation)

    def _permutation(self, epoch: int) -> np.ndarray:
        """All passes of an epoch in order, (passes, images_per_pass)."""
        rng = make_item_generator(self.seed, epoch, EpochStream.DETECTION_ORDER)
        shuffled = [rng.permutation(group) for group in self.groups if len(group)]
        passes = np.concatenate([self._passes(group) for group in shuffled])
        order = rng.permutation(len(passes))
        return passes[np.resize(order, self.steps_per_epoch * self.passes_per_step)]

    def _passes(self, group: np.ndarray) -> np.ndarray:
        count = -(-len(group) // self.size)
        return np.resize(group, (count, self.size))

    def passes(self, step: int) -> np.ndarray:
        """This rank's passes of a step, (passes_per_step / world, images_per_pass)."""
        epoch, within = divmod(step, self.steps_per_epoch)
        batch = self.permutation(epoch)[
            within * self.passes_per_step : (within + 1) * self.passes_per_step
        ]
        share = self.passes_per_step // self.world
        return batch[self.rank * share : (self.rank + 1) * share]


@dataclass(frozen=True)
class MicroBatch:
    """Images (N, 3, H, W), normalised and padded, their objects and their numbers in the split."""

    images: Tensor
    targets: tuple[Targets, ...]
    indices: tuple[int, ...]


def iter_micro_batches(
    split: CocoSplit,
    chosen: Sequence[int],
    order: AspectGroupedOrder,
    steps: range,
    *,
    scales: Scales,
    multiple: int,
    threads: int,
) -> Generator[list[MicroBatch]]:
    """This rank's passes of each step, from `chosen` images; views are a function of (seed, epoch, image id)."""
    share = order.passes_per_step // order.world

    def ready(drawn: tuple[int, np.ndarray]) -> MicroBatch:
        epoch, numbers = drawn
        indices = tuple(chosen[i] for i in numbers)
        views = [load_training_view(split, index, order.seed, epoch, scales) for index in indices]
        return MicroBatch(
            pad_batch([v[0] for v in views], multiple), tuple(v[1] for v in views), indices
        )

    draws = (
        (step // order.steps_per_epoch, numbers) for step in steps for numbers in order.passes(step)
    )
    passes = map_prefetched(ready, draws, threads)
    for _ in steps:
        yield [next(passes) for _ in range(share)]


def load_training_view(
    split: CocoSplit, index: int, seed: int, epoch: int, scales: Scales
) -> tuple[Tensor, Targets]:
    """Normalised view (3, h, w) of an image and the objects in it."""
    entry = split.images[index]
    rng = make_generator(seed, epoch, entry.number, SampleStream.DETECTION_VIEW)
    plan = draw_view_plan(rng, entry.size, scales)
    image, targets = apply_view_plan(
        plan, split.read(index), *split.objects(index), make_image_key(seed, epoch, entry.number)
    )
    return normalize_pixels(image), targets
