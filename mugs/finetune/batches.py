"""Training batches: the sampler, and views by timm's transform.

A view is a function of (seed, epoch, sample, copy). timm's transforms draw from the global
generators, so these are seeded for each image, whichever process makes it.
"""

import random
from collections.abc import Generator, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageOps
from timm.data.auto_augment import RandAugment
from timm.data.transforms_factory import create_transform
from torch import Tensor

from mugs.data.loading.order import SampleOrder
from mugs.data.loading.worker_batches import LabeledBatch, iter_batches, stack_samples
from mugs.data.sources.base import Source
from mugs.data.sources.decode import decode_rgb
from mugs.data.views.config import IMAGENET_MEAN, IMAGENET_STD
from mugs.finetune.config import ImageOptions

# With repeated augmentation, timm's sampler rounds the number of images of an epoch down to a
# multiple of this.
ROUND = 256


@dataclass(frozen=True)
class ViewRequest:
    """One view to make: `copy` counts the views of a sample in an epoch."""

    epoch: int
    sample: int
    copy: int


class BatchSampler:
    """The global batches of a run; an incomplete last batch of an epoch is left out.

    With `repeats` above 1 (repeated augmentation), each sample of the permutation comes that many
    times in a row, and the epoch ends after as many views as there are images, rounded down.

    Raises:
        ValueError: The data set does not fill one batch.
    """

    def __init__(self, num: int, *, seed: int, batch_size: int, repeats: int) -> None:
        # One permutation for all ranks; `view_requests` picks the columns of a rank.
        self.order = SampleOrder(num, seed=seed, world=1, rank=0, batch_size=1)
        self.batch_size = batch_size
        self.repeats = repeats
        used = num if repeats == 1 else num // ROUND * ROUND
        self.steps_per_epoch = used // batch_size
        if self.steps_per_epoch == 0:
            cut = (
                ""
                if repeats == 1
                else f" ({used} with repeats {repeats}: rounded down to a multiple of {ROUND})"
            )
            raise ValueError(f"batch_size {batch_size} exceeds the data set's {num} images{cut}")

    def view_requests(self, step: int, columns: np.ndarray) -> list[ViewRequest]:
        """Return what is in the given columns of the global batch of a step."""
        epoch, within = divmod(step, self.steps_per_epoch)
        places = within * self.batch_size + columns
        samples = self.order.permutation(epoch)[places // self.repeats]
        return [
            ViewRequest(epoch, int(sample), int(place % self.repeats))
            for sample, place in zip(samples, places, strict=True)
        ]


def build_training_transform(options: ImageOptions) -> Any:
    """Return timm's training transform: RGB image -> normalized float tensor (3, S, S)."""
    transform = create_transform(
        options.size,
        is_training=True,
        scale=options.scale,
        hflip=options.flip_prob,
        color_jitter=None,  # type: ignore[arg-type]
        auto_augment=options.randaugment or None,
        interpolation="bicubic",
        mean=IMAGENET_MEAN,
        std=IMAGENET_STD,
        re_prob=options.erase_prob,
        re_mode="pixel",
    )
    # timm's Posterize can ask for 0 bits, see `posterize`.
    policies = [stage for stage in transform.transforms if isinstance(stage, RandAugment)]
    for operation in (operation for policy in policies for operation in policy.ops):
        if operation.name.startswith("Posterize"):
            operation.aug_fn = posterize
    return transform


def posterize(image: Image.Image, bits: int, **_: Any) -> Image.Image:
    """Keep the upper `bits` of each level; 0 bits give a black image, which Pillow 13 refuses."""
    return image.point(lambda _: 0) if bits == 0 else ImageOps.posterize(image, bits)


@contextmanager
def seed_global_generators(*key: int) -> Iterator[None]:
    """Seed the global generators of Python, NumPy and torch (CPU) from `key`, then restore them."""
    python_state = random.getstate()
    numpy_state = np.random.get_state()
    words = [int(word) for word in np.random.SeedSequence(key).generate_state(3)]
    random.seed(words[0])
    np.random.seed(words[1])
    try:
        with torch.random.fork_rng(devices=[]):
            # `torch.manual_seed` would seed the GPUs too, which a worker process must not touch.
            torch.default_generator.manual_seed(words[2])
            yield
    finally:
        random.setstate(python_state)
        np.random.set_state(numpy_state)


class AugmentedViews:
    """Makes the views that are requested.

    Raises:
        DecodeError, SourceError: An image cannot be used; the message names it.
    """

    def __init__(self, source: Source, options: ImageOptions, seed: int) -> None:
        self.source = source
        self.seed = seed
        self.transform = build_training_transform(options)

    def __call__(self, request: ViewRequest) -> tuple[Tensor, int, int]:
        """Return view (3, S, S), label and sample number."""
        sample = request.sample
        image = decode_rgb(self.source.read(sample), self.source.describe(sample))
        # Decoding draws nothing, so it needs no seed.
        with seed_global_generators(self.seed, request.epoch, sample, request.copy):
            return self.transform(image), self.source.label(sample), sample


def load_batches(
    views: AugmentedViews,
    batches: BatchSampler,
    columns: np.ndarray,
    start: int,
    stop: int,
    workers: int,
) -> Generator[LabeledBatch]:
    """Yield this rank's batches of steps start ... stop - 1.

    They are made by `workers` processes, or by this one if that is 0. What an image raised is
    raised when its batch is due.
    """
    return iter_batches(
        views,
        (batches.view_requests(step, columns) for step in range(start, stop)),
        stack_samples,
        workers,
    )
