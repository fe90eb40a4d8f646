"""Where a linear probe takes its features from: fixed ones, or a frozen backbone on fresh views."""

from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from mugs import distributed
from mugs.data.loading.evaluation import Augmentation, iter_probe_batches
from mugs.data.loading.order import SampleOrder
from mugs.data.sources.base import Source
from mugs.evaluation.linear import BatchFactory


def build_order(num_images: int, *, seed: int, batch_size: int) -> SampleOrder:
    """The order of this rank; the last batch of an epoch is short, as released."""
    world, rank = distributed.world_size(), distributed.rank()
    return SampleOrder(
        num_images, seed=seed, world=world, rank=rank, batch_size=batch_size, short_last=True
    )


def build_feature_batches(features: Tensor, labels: Tensor, order: SampleOrder) -> BatchFactory:
    """Batches of features (N, D) that stay the same in every epoch."""

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
    """Features of a fresh view of every image in every epoch."""

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
            with torch.no_grad():
                features = model(images)
            yield features, labels

    return batches
