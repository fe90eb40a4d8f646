"""Batches for a linear probe: stored features, or a frozen backbone on fresh views."""

from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from mugs import distributed
from mugs.data.loading.evaluation import Augmentation, iter_probe_batches
from mugs.data.loading.order import SampleOrder
from mugs.data.sources.base import Source
from mugs.evaluation.linear import BatchFactory


def build_order(num_images: int, *, seed: int, batch_size: int) -> SampleOrder:
    """Return the sample order of this rank.

    The last batch of an epoch is short: the release does not drop incomplete batches here.
    """
    return SampleOrder(
        num_images,
        seed=seed,
        world=distributed.world_size(),
        rank=distributed.rank(),
        batch_size=batch_size,
        short_last=True,
    )


def build_feature_batches(features: Tensor, labels: Tensor, order: SampleOrder) -> BatchFactory:
    """Return batches of features (N, D) that are the same in every epoch."""

    def batches(start: int, stop: int) -> Iterator[tuple[Tensor, Tensor]]:
        for step in range(start, stop):
            ids = torch.from_numpy(order.indices(step)).to(features.device)
            yield features[ids], labels[ids]

    return batches


def build_image_batches(
    model: Callable[[Tensor], Tensor],
    source: Source,
    order: SampleOrder,
    *,
    seed: int,
    augmentation: Augmentation,
    crop: int,
    threads: int,
    device: torch.device,
) -> BatchFactory:
    """Return batches of features that `model` computes from a fresh view of each image."""

    def batches(start: int, stop: int) -> Iterator[tuple[Tensor, Tensor]]:
        views = iter_probe_batches(
            source,
            order,
            start,
            stop,
            seed=seed,
            augmentation=augmentation,
            crop=crop,
            device=device,
            threads=threads,
        )
        for images, labels in views:
            # Not around the `yield`: a generator would leave the caller in no-grad mode.
            with torch.no_grad():
                features = model(images)
            yield features, labels

    return batches
