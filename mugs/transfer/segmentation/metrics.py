"""Confusion matrix, and the scores that follow from it."""

from dataclasses import dataclass

import torch
from torch import Tensor

from mugs.data.dense.label_maps import VOID


@dataclass(frozen=True)
class SegmentationScores:
    """In percent: mean intersection over union, mean class accuracy, pixel accuracy."""

    miou: float
    macc: float
    aacc: float


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
