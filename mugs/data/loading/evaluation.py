"""Images for evaluations, and single views to train a probe on.

Evaluation images are preprocessed by PIL exactly as torchvision does, come in order, and none is
repeated.
"""

from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Literal

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from mugs.data.loading.batch import Batch
from mugs.data.loading.device import DeviceTransform
from mugs.data.loading.order import SampleOrder
from mugs.data.prefetch import map_prefetched
from mugs.data.sources.base import Source
from mugs.data.sources.decode import decode_rgb
from mugs.data.views.config import IMAGENET_MEAN, IMAGENET_STD, ViewRecipe
from mugs.data.views.plan import Box, CropPlan, draw_crop_box, draw_strong_crop
from mugs.data.views.render.erase import BoxNoise, ErasedBox, draw_box_noise, join_noise
from mugs.data.views.render.reference import crop_and_resize, render_crop_pil, resize_pil
from mugs.random_streams import SampleStream, make_generator

Augmentation = Literal["strong", "crop_flip"]
Interpolation = Literal["bicubic", "bilinear"]


def preprocess_eval_image(
    image: Image.Image, short_side: int, crop: int, interpolation: Interpolation = "bicubic"
) -> np.ndarray:
    """Resize the shorter side to `short_side` and cut out the center; return uint8 (3, crop, crop).

    Roundings are those of torchvision's Resize (down) and CenterCrop (to the nearest, halves to
    even).
    """
    width, height = image.size
    short = min(width, height)
    size = (int(short_side * width / short), int(short_side * height / short))
    image = resize_pil(image, *size, resample=Image.Resampling[interpolation.upper()])
    left = round((size[0] - crop) / 2)
    top = round((size[1] - crop) / 2)
    return np.asarray(image.crop((left, top, left + crop, top + crop))).transpose(2, 0, 1)


def iter_eval_batches(
    source: Source,
    *,
    resize: int = 256,
    crop: int = 224,
    interpolation: Interpolation = "bicubic",
    batch_size: int = 256,
    indices: Sequence[int] | None = None,
    threads: int = 2,
) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
    """Yield normalized images (N, 3, crop, crop), labels and ids of the given samples in order."""
    chosen = list(range(len(source))) if indices is None else list(indices)
    mean, std = (torch.tensor(v).view(3, 1, 1) for v in (IMAGENET_MEAN, IMAGENET_STD))

    def load_pixels(index: int) -> np.ndarray:
        image = decode_rgb(source.read(index), source.describe(index))
        return preprocess_eval_image(image, resize, crop, interpolation)

    # Images wait as bytes and become floats batch by batch, as floats take four times the memory.
    images = map_prefetched(load_pixels, chosen, threads)
    for first in range(0, len(chosen), batch_size):
        ids = chosen[first : first + batch_size]
        batch = torch.from_numpy(np.stack([next(images) for _ in ids]))
        labels = torch.tensor([source.label(i) for i in ids])
        yield batch.float().div_(255).sub_(mean).div_(std), labels, torch.tensor(ids)


def render_probe_view(
    source: Source,
    epoch: int,
    sample: int,
    *,
    seed: int,
    augmentation: Augmentation,
    recipe: ViewRecipe,
) -> tuple[np.ndarray, Box]:
    """Return one training view of a sample, uint8 (3, S, S), and its erased box.

    Both are a function of (seed, epoch, sample).
    """
    image = decode_rgb(source.read(sample), source.describe(sample))
    rng = make_generator(seed, epoch, sample, SampleStream.PROBE_VIEW)
    box = draw_crop_box(rng, image.width, image.height, recipe.large_scale, recipe.ratio)
    if augmentation == "strong":
        plan = draw_strong_crop(rng, recipe.large_size, box, 0, recipe)
        return np.asarray(render_crop_pil(image, plan)).transpose(2, 0, 1), plan.erase
    plan = CropPlan(recipe.large_size, box, bool(rng.random() < recipe.flip_prob), strong=False)
    view = np.asarray(crop_and_resize(image, plan))
    return (view[:, ::-1] if plan.flip else view).transpose(2, 0, 1), plan.erase


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
    to_device = DeviceTransform(device, recipe)
    each = order.steps_per_epoch

    def draw(item: tuple[int, int, int]) -> tuple[np.ndarray, BoxNoise]:
        epoch, sample, slot = item
        view, box = render_probe_view(
            source, epoch, sample, seed=seed, augmentation=augmentation, recipe=recipe
        )
        # Erased on the device, as in pretraining, after normalizing.
        erased = [ErasedBox(0, box, slot * view.size, crop)] if box[2] > 0 else []
        return view, draw_box_noise(seed, epoch, sample, erased)

    # The threads walk through the steps ahead of the loop below, so the order is asked for twice.
    items = (
        (step // each, int(sample), slot)
        for step in range(start, stop)
        for slot, sample in enumerate(order.indices(step))
    )
    views = map_prefetched(draw, items, threads)
    for step in range(start, stop):
        ids = order.indices(step)
        drawn = [next(views) for _ in ids]
        labels = torch.tensor([source.label(int(i)) for i in ids])
        large = torch.from_numpy(np.stack([view for view, _ in drawn]))[None]
        # A batch of pretraining with a single large crop and no small ones (the empty slice).
        batch = Batch(
            large=large,
            small=large[:0],
            noise=join_noise([noise for _, noise in drawn]),
            extras={},
            ids=torch.from_numpy(ids),
            labels=labels,
            epoch=step // each,
            step=step,
        )
        yield to_device(batch).large[0], labels.to(device)
