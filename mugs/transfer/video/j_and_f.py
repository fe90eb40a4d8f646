"""DAVIS' measures of a mask: J, the overlap of regions, and F, the agreement of boundaries.

Masks are boolean (H, W). Values are shares, not percent.
"""

from dataclasses import dataclass

import numpy as np
from scipy.ndimage import distance_transform_edt

TOLERANCE = 0.008  # of the diagonal


@dataclass(frozen=True)
class VideoScores:
    """In percent, over all objects: J and F, each the mean over objects of the mean over frames, and their mean."""

    jf: float
    j: float
    f: float


def region_similarity(predicted: np.ndarray, truth: np.ndarray) -> float:
    """Intersection over union; 1 where both are empty."""
    union = np.count_nonzero(predicted | truth)
    return 1.0 if union == 0 else np.count_nonzero(predicted & truth) / union


def find_boundary(mask: np.ndarray) -> np.ndarray:
    """Pixels that differ from the one to the right, below, or right below; at the last row and column only along it."""
    padded = np.pad(mask, ((0, 1), (0, 1)), mode="edge")
    right, below, diagonal = padded[:-1, 1:], padded[1:, :-1], padded[1:, 1:]
    return np.asarray((mask ^ right) | (mask ^ below) | (mask ^ diagonal))


def boundary_accuracy(predicted: np.ndarray, truth: np.ndarray) -> float:
    """F measure of boundary pixels that have one of the other mask within 0.8% of the diagonal, rounded up."""
    radius = np.ceil(TOLERANCE * np.hypot(*truth.shape))
    mine, theirs = find_boundary(predicted), find_boundary(truth)
    if not mine.any() or not theirs.any():
        return float(mine.any() == theirs.any())
    precision = np.mean(distance_transform_edt(~theirs)[mine] <= radius)
    recall = np.mean(distance_transform_edt(~mine)[theirs] <= radius)
    return 0.0 if precision + recall == 0 else float(2 * precision * recall / (precision + recall))


def score_objects(predicted: np.ndarray, truth: np.ndarray, num_objects: int) -> np.ndarray:
    """(O, 2): J and F of objects 1 ... O of a video, label maps (T, H, W), without the first and the last frame."""
    inner = range(1, len(truth) - 1)
    table = np.empty((num_objects, len(inner), 2))
    for number in range(num_objects):
        for place, frame in enumerate(inner):
            mine, theirs = predicted[frame] == number + 1, truth[frame] == number + 1
            table[number, place] = region_similarity(mine, theirs), boundary_accuracy(mine, theirs)
    mean: np.ndarray = table.mean(axis=1)
    return mean


def average_scores(table: np.ndarray) -> VideoScores:
    """Scores of all objects of all videos, (n, 2)."""
    j, f = (100 * table.mean(axis=0)).tolist()
    return VideoScores(jf=(j + f) / 2, j=j, f=f)
