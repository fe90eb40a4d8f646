"""Test of a segmenter: every validation image once, whole or by sliding windows, and its scores.

Logits of overlapping windows are averaged where they overlap; the scores follow from the confusion
matrix of all pixels.
"""

from collections.abc import Callable
from dataclasses import dataclass
from itertools import product
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from mugs import distributed
from mugs.data.dense.ade20k import SceneFolder
from mugs.data.dense.label_maps import VOID
from mugs.data.dense.pictures import overlay_labels, save_png, side_by_side
from mugs.engine.precision import autocast
from mugs.engine.progress import Progress
from mugs.transfer.segmentation.batches import Scene, iter_scenes
from mugs.transfer.segmentation.config import SegmentationConfig
from mugs.transfer.segmentation.heads import resize_bilinear
from mugs.transfer.segmentation.model import Segmenter

CAPTION = (
    "The image, the prediction over it, the annotation over it. A pixel has the color of its "
    "class: class k has color k + 1 of PASCAL VOC. Void pixels have no color."
)


@dataclass(frozen=True)
class SegmentationScores:
    """In percent: mean intersection over union, mean class accuracy, pixel accuracy."""

    miou: float
    macc: float
    aacc: float


@torch.no_grad()
def evaluate_scenes(
    model: Segmenter,
    scenes: SceneFolder,
    config: SegmentationConfig,
    device: torch.device,
    *,
    run_dir: Path,
    num_pictures: int = 0,
) -> SegmentationScores:
    """Return the scores over all scenes, the same on all ranks.

    The first `num_pictures` scenes are drawn to `run_dir/pictures`.
    """
    model = model.to(device).eval()
    model.clear_draws()
    num_classes = config.num_classes
    # No image is repeated to make the ranks equal, so the summed counts are exact.
    own_indices = range(distributed.rank(), len(scenes), distributed.world_size())
    counts = torch.zeros(num_classes, num_classes, dtype=torch.int64, device=device)
    progress = Progress(
        "segmentation test",
        len(own_indices),
        unit="images",
        path=run_dir / "progress.json",
        quiet=not distributed.is_main(),
    )
    for done, scene in enumerate(
        iter_scenes(scenes, config.scenes, own_indices, workers=config.workers), 1
    ):
        predicted = predict_scene(model, scene, config, device)
        counts += count_confusion(predicted, scene.labels.to(device), num_classes)
        if scene.sample < num_pictures:
            save_png(
                run_dir / "pictures" / f"{scenes.names[scene.sample]}.png",
                compose_scene_picture(scene, predicted.cpu().numpy()),
            )
        progress.update(done)
    progress.close()
    return compute_scores(distributed.all_gather_rows(counts[None]).sum(dim=0))


def predict_scene(
    model: Segmenter, scene: Scene, config: SegmentationConfig, device: torch.device
) -> Tensor:
    """Return the predicted label map (H, W) of a scene, at the size of its annotation."""
    recipe = config.scenes
    image = scene.view.to(device)
    with autocast(config.test_precision, device):
        if recipe.test == "whole":
            logits = model.logits(image[None])[0]
        else:
            logits = slide_windows(
                model.logits,
                image,
                num_classes=config.num_classes,
                window=recipe.window,
                stride=recipe.stride,
            )
    return argmax_at_size(logits, *scene.labels.shape)


def compose_scene_picture(scene: Scene, predicted: np.ndarray) -> np.ndarray:
    """Return the image, the prediction over it, and the annotation over it, side by side."""
    image = scene.picture.permute(1, 2, 0).numpy()
    maps = (predicted.astype(np.uint8), scene.labels.numpy())
    return side_by_side([image, *(overlay_labels(image, labels, first=1) for labels in maps)])


def window_starts(length: int, window: int, stride: int) -> list[int]:
    """Return the first pixels of the windows along a side; the last one ends with the side."""
    count = max(length - window + stride - 1, 0) // stride + 1
    return [max(min(index * stride, length - window), 0) for index in range(count)]


def slide_windows(
    logits: Callable[[Tensor], Tensor],
    image: Tensor,
    *,
    num_classes: int,
    window: int,
    stride: int,
    at_once: int = 4,
) -> Tensor:
    """Return logits (K, H, W) of an image (3, H, W): the mean over the windows that cover a pixel.

    logits: maps (n, 3, h, w) to (n, K, h, w). A side shorter than the window is taken whole.
    `at_once` windows run together.
    """
    height, width = image.shape[1:]
    tall = min(window, height)
    wide = min(window, width)
    corners = list(
        product(window_starts(height, window, stride), window_starts(width, window, stride))
    )
    total = torch.zeros(num_classes, height, width, device=image.device)
    cover = torch.zeros(height, width, device=image.device)
    for first in range(0, len(corners), at_once):
        some = corners[first : first + at_once]
        scores = logits(torch.stack([image[:, y : y + tall, x : x + wide] for y, x in some]))
        for (y, x), score in zip(some, scores, strict=True):
            total[:, y : y + tall, x : x + wide] += score
            cover[y : y + tall, x : x + wide] += 1
    return total / cover


def argmax_at_size(logits: Tensor, height: int, width: int, *, at_once: int = 16) -> Tensor:
    """Resize logits (K, h, w) and return the classes (height, width) with the largest ones."""
    # Some classes at a time: 150 maps at the size of a photograph would need gigabytes.
    best = torch.full((height, width), float("-inf"), device=logits.device)
    label = torch.zeros(height, width, dtype=torch.int64, device=logits.device)
    for first in range(0, len(logits), at_once):
        value, index = resize_bilinear(logits[None, first : first + at_once], (height, width))[
            0
        ].max(dim=0)
        # Strictly larger: of equal logits the first class wins, as in one `argmax`.
        better = value > best
        best = torch.where(better, value, best)
        label = torch.where(better, index + first, label)
    return label


def count_confusion(predicted: Tensor, labels: Tensor, num_classes: int) -> Tensor:
    """Return counts (K, K) of (label, prediction) over the pixels that are not void.

    Raises:
        ValueError: A label is no class, or the shapes differ.
    """
    if predicted.shape != labels.shape:
        raise ValueError(
            f"prediction {tuple(predicted.shape)} and label map {tuple(labels.shape)} "
            "differ in shape"
        )
    known = labels != VOID
    pairs = labels[known].long() * num_classes + predicted[known].long()
    if len(pairs) and int(labels[known].max()) >= num_classes:
        raise ValueError(
            f"label {int(labels[known].max())} in a label map of {num_classes} classes"
        )
    return torch.bincount(pairs, minlength=num_classes**2).view(num_classes, num_classes)


def compute_scores(counts: Tensor) -> SegmentationScores:
    """Return the scores of counts (K, K) that were summed over all images."""
    counts = counts.double()
    hit = counts.diagonal()
    labeled = counts.sum(dim=1)
    predicted = counts.sum(dim=0)
    # 0 / 0 for classes neither labeled nor predicted: NaN, which the means leave out.
    iou = hit / (labeled + predicted - hit)
    return SegmentationScores(
        miou=100 * iou.nanmean().item(),
        macc=100 * (hit / labeled).nanmean().item(),
        aacc=100 * (hit.sum() / labeled.sum()).item(),
    )
