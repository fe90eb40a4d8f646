"""Test of a segmenter: every validation image once, whole or by sliding windows, and its scores.

Logits of overlapping windows are averaged where they overlap; the scores follow from the confusion
matrix of all pixels.
"""

from collections.abc import Callable, Sequence
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
from mugs.devices import copy_to_device
from mugs.engine.precision import autocast
from mugs.engine.progress import Progress
from mugs.transfer.bootstrap import bootstrap_errors
from mugs.transfer.segmentation.batches import Scene, iter_scenes
from mugs.transfer.segmentation.config import SegmentationConfig
from mugs.transfer.segmentation.heads import resize_bilinear
from mugs.transfer.segmentation.model import Segmenter
from pipeline.files import replace_atomically

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
    per_image = []
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
        own_counts = count_confusion(predicted, copy_to_device(scene.labels, device), num_classes)
        counts += own_counts
        per_image.append(summarize_counts(own_counts))
        if scene.sample < num_pictures:
            save_png(
                run_dir / "pictures" / f"{scenes.names[scene.sample]}.png",
                compose_scene_picture(scene, predicted.cpu().numpy()),
            )
        progress.update(done)
    progress.close()
    write_part(run_dir, [scenes.names[index] for index in own_indices], per_image, num_classes)
    return compute_scores(distributed.all_gather_rows(counts[None]).sum(dim=0))


def summarize_counts(counts: Tensor) -> np.ndarray:
    """Return the pixels (3, K) of each class that are right, labeled, and predicted."""
    parts = [counts.diagonal(), counts.sum(dim=1), counts.sum(dim=0)]
    return torch.stack(parts).cpu().numpy().astype(np.int32)


def write_part(
    run_dir: Path, names: Sequence[str], tables: Sequence[np.ndarray], num_classes: int
) -> None:
    """Write this rank's pixel counts of each image; `merge_parts` makes one file of all."""
    # The number of ranks is in the name, so that a restart on fewer ranks reads no old parts.
    path = _part_path(run_dir, distributed.rank(), distributed.world_size())
    path.parent.mkdir(parents=True, exist_ok=True)
    pixels = np.stack(tables) if tables else np.zeros((0, 3, num_classes), np.int32)
    with replace_atomically(path) as temporary, open(temporary, "wb") as file:
        np.savez_compressed(file, names=np.array(names, dtype=str), pixels=pixels)


def _part_path(run_dir: Path, rank: int, world: int) -> Path:
    return run_dir / "per_image" / f"part_{rank:04d}_of_{world:04d}.npz"


def merge_parts(run_dir: Path, target: Path) -> np.ndarray:
    """Write the pixel counts of all images into one file, by name, and return them (N, 3, K).

    Called on one rank, after all have written their parts.
    """
    world = distributed.world_size()
    parts = [np.load(_part_path(run_dir, rank, world)) for rank in range(world)]
    names = np.concatenate([part["names"] for part in parts])
    order = np.argsort(names, kind="stable")
    pixels = np.concatenate([part["pixels"] for part in parts])[order]
    with replace_atomically(target) as temporary, open(temporary, "wb") as file:
        np.savez_compressed(file, names=names[order], pixels=pixels)
    return np.asarray(pixels)


def estimate_errors(pixels: np.ndarray) -> SegmentationScores:
    """Return the standard errors of the scores, from the pixel counts (N, 3, K) of each image."""

    def score(draws: np.ndarray) -> np.ndarray:
        hit, labeled, predicted = (draws @ pixels[:, kind].astype(np.float64) for kind in range(3))
        # 0 / 0 for classes that a draw does not have: NaN, which the means leave out.
        with np.errstate(invalid="ignore"):
            iou = hit / (labeled + predicted - hit)
            recall = hit / labeled
            overall = hit.sum(axis=1) / labeled.sum(axis=1)
        return 100 * np.stack([np.nanmean(iou, axis=1), np.nanmean(recall, axis=1), overall], 1)

    miou, macc, aacc = bootstrap_errors(len(pixels), score).tolist()
    return SegmentationScores(miou=miou, macc=macc, aacc=aacc)


def predict_scene(
    model: Segmenter, scene: Scene, config: SegmentationConfig, device: torch.device
) -> Tensor:
    """Return the predicted label map (H, W) of a scene, at the size of its annotation."""
    recipe = config.scenes
    image = copy_to_device(scene.view, device)
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
