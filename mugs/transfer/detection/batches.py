"""Which images are trained on together, and views that are loaded ahead of the loop."""

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
from mugs.transfer.detection.boxes import Targets
from mugs.transfer.detection.config import Scales
from mugs.transfer.detection.views import apply_detection_plan, draw_detection_plan, pad_batch


class AspectGroupedOrder:
    """Micro-batches of images that are all wide or all not, shuffled by (seed, epoch).

    The images of a micro-batch are padded to a common size, and attention sees the padding. So
    micro-batches are part of the recipe and do not depend on the number of ranks. Images are
    repeated to fill the last micro-batch of either kind and the last batch.

    Raises:
        ValueError: The batch does not divide over the ranks, or there is no image.
    """

    def __init__(
        self,
        wide: Sequence[bool],
        *,
        seed: int,
        world: int,
        rank: int,
        batch_size: int,
        micro_batch_size: int,
    ) -> None:
        if batch_size % (world * micro_batch_size):
            raise ValueError(
                f"batch_size {batch_size} does not divide over {world} ranks "
                f"into passes of {micro_batch_size} images"
            )
        if not len(wide):
            raise ValueError("no image to train on")
        self.groups = [np.flatnonzero(np.asarray(wide) == kind) for kind in (False, True)]
        self.seed = seed
        self.world = world
        self.rank = rank
        self.size = micro_batch_size
        self.micro_batches_per_step = batch_size // micro_batch_size
        num_micro_batches = sum(-(-len(group) // micro_batch_size) for group in self.groups)
        self.steps_per_epoch = -(-num_micro_batches // self.micro_batches_per_step)
        # Cached, because every step of an epoch asks for the same permutation.
        self.permutation = lru_cache(EPOCHS_KEPT)(self._permutation)

    def _permutation(self, epoch: int) -> np.ndarray:
        """Return all micro-batches of an epoch in order, (number, micro_batch_size)."""
        rng = make_item_generator(self.seed, epoch, EpochStream.DETECTION_ORDER)
        shuffled = [rng.permutation(group) for group in self.groups if len(group)]
        # `np.resize` repeats the first entries where entries are missing.
        micro_batches = np.concatenate(
            [np.resize(group, (-(-len(group) // self.size), self.size)) for group in shuffled]
        )
        order = rng.permutation(len(micro_batches))
        return micro_batches[np.resize(order, self.steps_per_epoch * self.micro_batches_per_step)]

    def micro_batches(self, step: int) -> np.ndarray:
        """Return this rank's share of a step's micro-batches, (share, micro_batch_size)."""
        epoch, within = divmod(step, self.steps_per_epoch)
        share = self.micro_batches_per_step // self.world
        first = within * self.micro_batches_per_step + self.rank * share
        return self.permutation(epoch)[first : first + share]


@dataclass(frozen=True)
class MicroBatch:
    """Images (N, 3, H, W), normalized and padded, their objects and their indices in the split."""

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
    """Yield this rank's micro-batches of each step, from the `chosen` images of a split.

    Views are a function of (seed, epoch, image id).
    """
    share = order.micro_batches_per_step // order.world

    def load(request: tuple[int, np.ndarray]) -> MicroBatch:
        epoch, numbers = request
        indices = tuple(chosen[i] for i in numbers)
        views = [load_training_view(split, index, order.seed, epoch, scales) for index in indices]
        return MicroBatch(
            pad_batch([v[0] for v in views], multiple), tuple(v[1] for v in views), indices
        )

    requests = (
        (step // order.steps_per_epoch, numbers)
        for step in steps
        for numbers in order.micro_batches(step)
    )
    micro_batches = map_prefetched(load, requests, threads)
    for _ in steps:
        yield [next(micro_batches) for _ in range(share)]


def load_training_view(
    split: CocoSplit, index: int, seed: int, epoch: int, scales: Scales
) -> tuple[Tensor, Targets]:
    """Return a normalized view (3, h, w) of an image and the objects in it."""
    entry = split.images[index]
    plan = draw_detection_plan(
        make_generator(seed, epoch, entry.number, SampleStream.DETECTION_VIEW), entry.size, scales
    )
    image, targets = apply_detection_plan(
        plan, split.read(index), *split.objects(index), make_image_key(seed, epoch, entry.number)
    )
    return normalize_pixels(image), targets
