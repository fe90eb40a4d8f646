"""Images for evaluations, and single views to train a probe on, as floats on the device.

They take the way of pretraining: workers draw bytes, the device turns them into floats. Images of
evaluations come in order, and none is repeated.
"""

from collections.abc import Iterator, Sequence
from contextlib import closing
from dataclasses import replace

import numpy as np
import torch
from torch import Tensor

from mugs.data.loading.device import DeviceTransform
from mugs.data.loading.drawing import Augmentation, CenterCrop, Interpolation, ProbeView
from mugs.data.loading.order import FixedOrder, SampleOrder
from mugs.data.loading.view_loader import ViewLoader
from mugs.data.sources.base import Source
from mugs.data.views.config import ViewRecipe
from mugs.devices import copy_to_device

AHEAD = 3  # batches that are prefetched at most
CPU = torch.device("cpu")


def iter_eval_batches(
    source: Source,
    *,
    resize: int = 256,
    crop: int = 224,
    interpolation: Interpolation = "bicubic",
    batch_size: int = 256,
    indices: Sequence[int] | None = None,
    threads: int = 2,
    device: torch.device = CPU,
) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
    """Yield normalized images (N, 3, crop, crop) on the device, labels and ids, in order.

    Args:
        source: the images.
        resize: length of the shorter side, in pixels.
        crop: side of the center that is cut out.
        interpolation: filter of the resize, with antialiasing.
        batch_size: images of a batch; the last one may be smaller.
        indices: the samples, all if None.
        threads: worker processes that decode and resize.
        device: where the images are copied to.
    """
    order = FixedOrder(np.arange(len(source)) if indices is None else indices, batch_size)
    if order.steps_per_epoch == 0:
        return
    drawing = CenterCrop(resize, crop, interpolation)
    to_device = DeviceTransform(device, ViewRecipe(large_size=crop, num_small=0))
    workers = min(threads, len(order.samples))
    with closing(ViewLoader(source, order, drawing, workers=workers, ahead=AHEAD)) as loader:
        for batch in loader.iterate(0, order.steps_per_epoch):
            yield to_device(batch).large[0], batch.labels, batch.ids


def iter_probe_batches(
    source: Source,
    order: SampleOrder,
    start: int,
    stop: int,
    *,
    seed: int,
    augmentation: Augmentation,
    crop: int,
    device: torch.device,
    threads: int = 2,
) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield this rank's training batches of global steps `start` to `stop` - 1, on the device.

    A batch is normalized views (N, 3, crop, crop) and labels. Views of the next batches are drawn
    while one is used.
    """
    # The linear probe of the release: crops of 8% to 100% of the image, erased after normalizing.
    recipe = replace(
        ViewRecipe(), large_size=crop, large_scale=(0.08, 1.0), num_small=0, erase_before_norm=False
    )
    drawing = ProbeView(recipe, seed, augmentation)
    to_device = DeviceTransform(device, recipe)
    with closing(ViewLoader(source, order, drawing, workers=threads, ahead=AHEAD)) as loader:
        for batch in loader.iterate(start, stop):
            yield to_device(batch).large[0], copy_to_device(batch.labels, device)
