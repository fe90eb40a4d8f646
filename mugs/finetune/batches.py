"""Training batches: which sample is in which, and its view by timm's transform.

A view is a function of (seed, epoch, sample, copy): the generators that timm's transforms draw from are set for each
image, whichever process makes it.
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

ROUND = 256  # with repeated augmentation, images per epoch are rounded down to a multiple of this (timm)


@dataclass(frozen=True)
class ViewRequest:
    """One view to make."""

    epoch: int
    sample: int
    copy: int


class BatchSampler:
    """The global batches of a run, the incomplete last one of an epoch left out.

    With `repeats` each sample of the permutation comes that many times in a row and the epoch is cut to the number of
    images, rounded down. Raises ValueError where there is no whole batch.
    """

    def __init__(self, num: int, *, seed: int, batch_size: int, repeats: int) -> None:
        self.order = SampleOrder(num, seed=seed, world=1, rank=0, batch_size=1)
        self.batch_size, self.repeats = batch_size, repeats
        used = num if repeats == 1 else num // ROUND * ROUND
        self.steps_per_epoch = used // batch_size
        if self.steps_per_epoch == 0:
            cut = (
                ""
                if repeats == 1
                else f" ({used} with repeats {repeats}: rounded down to a multiple of {ROUND})"
            )
            raise ValueError(f"batch_size {batch_size} exceeds the data set's {num} images{cut}")

    def draws(self, step: int, columns: np.ndarray) -> list[ViewRequest]:
        """What is in these columns of the global batch of a step."""
        epoch, within = divmod(step, self.steps_per_epoch)
        places = within * self.batch_size + columns
        samples = self.order.permutation(epoch)[places // self.repeats]
        return [
            ViewRequest(epoch, int(s), int(p))
            for s, p in zip(samples, places % self.repeats, strict=True)
        ]


def build_training_transform(options: ImageOptions) -> Any:
    """RGB image -> normalised, augmented float tensor (3, S, S), as timm makes it."""
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
    for stage in transform.transforms:
        if isinstance(stage, RandAugment):
            for operation in stage.ops:
                if operation.name.startswith("Posterize"):
                    operation.aug_fn = posterize
    return transform


def posterize(image: Image.Image, bits: int, **_: Any) -> Image.Image:
    """Keep the upper bits of each level; none of them gives a black image, where Pillow from 13 on refuses."""
    return image.point(lambda _: 0) if bits == 0 else ImageOps.posterize(image, bits)


@contextmanager
def seed_global_generators(*key: int) -> Iterator[None]:
    """The global generators of Python, NumPy and torch (CPU) as a function of the key; as they were, afterwards."""
    before = random.getstate(), np.random.get_state(), torch.get_rng_state()
    words = [int(word) for word in np.random.SeedSequence(key).generate_state(3)]
    random.seed(words[0])
    np.random.seed(words[1])
    torch.default_generator.manual_seed(words[2])
    try:
        yield
    finally:
        random.setstate(before[0])
        np.random.set_state(before[1])
        torch.set_rng_state(before[2])


class AugmentedViews:
    """Views, labels and sample numbers by draw. Raises DecodeError and SourceError naming the image."""

    def __init__(self, source: Source, options: ImageOptions, seed: int) -> None:
        self.source, self.seed = source, seed
        self.transform = build_training_transform(options)

    def __call__(self, draw: ViewRequest) -> tuple[Tensor, int, int]:
        image = decode_rgb(self.source.read(draw.sample), self.source.describe(draw.sample))
        with seed_global_generators(self.seed, draw.epoch, draw.sample, draw.copy):
            return self.transform(image), self.source.label(draw.sample), draw.sample


def load_batches(
    views: AugmentedViews,
    batches: BatchSampler,
    columns: np.ndarray,
    start: int,
    stop: int,
    workers: int,
) -> Generator[LabeledBatch]:
    """This rank's batches of steps start ... stop - 1, made by `workers` processes, or by this one with 0.

    Raises what an image raised, where its batch is due.
    """
    return iter_batches(
        views, (batches.draws(step, columns) for step in range(start, stop)), stack_samples, workers
    )
