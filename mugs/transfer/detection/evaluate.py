"""Detections on a split, over any number of ranks, and COCO's average precision."""

import contextlib
import io
import json
import logging
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from pycocotools import mask as rle
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval
from torch import Tensor

from mugs import distributed
from mugs.data.dense.coco import CocoSplit
from mugs.data.dense.pixels import fit_size, normalize_pixels, resize_image
from mugs.data.prefetch import map_prefetched
from mugs.data.sources.base import format_names
from mugs.devices import copy_to_device
from mugs.engine.precision import autocast
from mugs.engine.progress import Progress
from mugs.transfer.bootstrap import bootstrap_errors
from mugs.transfer.detection.boxes import Detections
from mugs.transfer.detection.config import DetectionConfig, Scales
from mugs.transfer.detection.detector import Detector
from mugs.transfer.detection.views import pad_batch
from pipeline.files import write_atomic

logger = logging.getLogger(__name__)
KINDS = {"box": "bbox", "mask": "segm"}
# An average precision takes seconds for 80 categories of 5,000 images.
AP_DRAWS = 200
METRICS = ("AP", "AP50", "AP75")  # the first three of pycocotools' twelve figures


def detect_split(
    model: Detector, split: CocoSplit, config: DetectionConfig, run_dir: Path, device: torch.device
) -> Path | None:
    """Detect on every image of a split and return a file in COCO's result format.

    Every rank takes every world-th image and writes its own part; rank 0 merges them. Returns None
    on the other ranks.
    """
    world = distributed.world_size()
    rank = distributed.rank()
    own_indices = range(rank, len(split), world)
    progress = Progress(
        "detect",
        len(own_indices),
        unit="images",
        path=run_dir / "progress.json",
        quiet=not distributed.is_main(),
    )
    found = []
    images = map_prefetched(
        lambda index: load_test_view(split, index, config.scales), own_indices, config.threads
    )
    model.eval()
    for done, (index, image) in enumerate(zip(own_indices, images, strict=True), 1):
        # One image per pass, as in the reference: attention would see the padding of a batch.
        entry = split.images[index]
        batch = copy_to_device(pad_batch([image], model.pyramid.strides[-1]), device)
        with autocast(config.test_precision, device):
            detections = model.detect(batch, (image.shape[1], image.shape[2]), entry.size)
        found.append(
            {"image_id": entry.number, "objects": to_coco_results(detections, split.categories)}
        )
        progress.update(done)
    progress.close()
    # Parts go through files, not through a gather: the masks of 5,000 images are large. The number
    # of ranks is in the name, so that a restart on fewer ranks does not read old parts.
    folder = run_dir / "detections"
    folder.mkdir(parents=True, exist_ok=True)
    parts = [folder / f"part_{r:04d}_of_{world:04d}.json" for r in range(world)]
    write_atomic(parts[rank], json.dumps(found))
    distributed.barrier()
    if not distributed.is_main():
        return None
    target = run_dir / "detections.json"
    write_atomic(target, json.dumps(merge_parts(parts, split)))
    return target


def load_test_view(split: CocoSplit, index: int, scales: Scales) -> Tensor:
    """Return a normalized image (3, h, w) with its shorter side at the test size."""
    size = fit_size(split.images[index].size, scales.test_short_side, scales.max_side)
    return normalize_pixels(resize_image(split.read(index), size))


def to_coco_results(found: Detections, categories: Sequence[int]) -> list[dict[str, Any]]:
    """Return each object in COCO's format: box as x, y, width, height, mask as run-length code."""
    lists = zip(
        found.boxes.tolist(),
        found.scores.tolist(),
        found.labels.tolist(),
        found.masks.cpu(),
        strict=True,
    )
    result = []
    for (x1, y1, x2, y2), score, label, mask in lists:
        # pycocotools reads columns, hence the Fortran order.
        code = rle.encode(np.asfortranarray(mask.numpy().astype(np.uint8)))
        outline = {"size": [int(v) for v in code["size"]], "counts": code["counts"].decode("ascii")}
        result.append(
            {
                "category_id": categories[label],
                "score": score,
                "bbox": [x1, y1, x2 - x1, y2 - y1],
                "segmentation": outline,
            }
        )
    return result


def merge_parts(parts: Sequence[Path], split: CocoSplit) -> list[dict[str, Any]]:
    """Return the detections of all parts.

    Raises:
        RuntimeError: An image of the split is missing, or is there twice.
    """
    images = [image for part in parts for image in json.loads(part.read_bytes())]
    counts = Counter(image["image_id"] for image in images)
    expected = Counter(image.number for image in split.images)
    wrong = [
        str(number) for number in sorted(counts | expected) if counts[number] != expected[number]
    ]
    if wrong:
        raise RuntimeError(
            f"{parts[0].parent}: expected every image exactly once, found missing or repeated "
            f"images {format_names(wrong)}"
        )
    return [{"image_id": image["image_id"], **one} for image in images for one in image["objects"]]


def compute_average_precision(annotations: Path, detections: Path) -> dict[str, float]:
    """Return AP, AP50 and AP75 of boxes and masks in percent, by pycocotools.

    With at most 100 detections per image, as COCO defines them.
    """
    results = json.loads(detections.read_bytes())
    result: dict[str, float] = {}
    for kind, code in KINDS.items():
        for name, value in zip(METRICS, run_coco_eval(annotations, results, code), strict=False):
            result[f"{kind} {name}"] = 100 * value
    return result


def estimate_errors(annotations: Path, detections: Path) -> dict[str, float]:
    """Return the standard errors of AP, AP50 and AP75 of boxes and masks, in percent.

    Nothing is known of them without detections.
    """
    results = json.loads(detections.read_bytes())
    errors: dict[str, float] = {}
    for kind, code in KINDS.items() if results else ():
        matches = collect_matches(match_detections(annotations, results, code))
        images = len(matches.images)

        def score(draws: np.ndarray, matches: "Matches" = matches) -> np.ndarray:
            return np.stack([matches.average_precision(counts) for counts in draws])

        found = bootstrap_errors(images, score, draws=AP_DRAWS)
        errors |= {f"{kind} {name}": 100 * e for name, e in zip(METRICS, found, strict=True)}
    return errors


@dataclass(frozen=True)
class CategoryMatches:
    """Detections of a category on all images, best score first, D of them, and its objects."""

    # Number of the image of each detection (D), and whether it is right, or wrong, at each of T
    # overlaps (T, D); those that are neither are on crowds.
    image: np.ndarray
    right: np.ndarray
    wrong: np.ndarray
    # Objects in each image.
    objects: np.ndarray


@dataclass(frozen=True)
class Matches:
    """Which detections are right on which images, so that AP of any draw of images follows."""

    images: Sequence[int]
    categories: Sequence[CategoryMatches]
    recalls: np.ndarray
    # Positions of the overlaps 0.5 and 0.75.
    half: int
    three_quarters: int

    def average_precision(self, counts: np.ndarray) -> np.ndarray:
        """Return AP, AP50 and AP75, as shares, if image i is there `counts[i]` times."""
        per_category = [
            self._precisions(category, counts)
            for category in self.categories
            # pycocotools leaves out categories without objects.
            if category.objects @ counts > 0
        ]
        if not per_category:
            return np.full(3, np.nan)
        table = np.mean(per_category, axis=0)
        return np.array([table.mean(), table[self.half], table[self.three_quarters]])

    def _precisions(self, category: CategoryMatches, counts: np.ndarray) -> np.ndarray:
        """Return the mean precision over recalls of a category, at each overlap (T,)."""
        weight = counts[category.image]
        right = np.cumsum(category.right * weight, axis=1, dtype=np.float64)
        wrong = np.cumsum(category.wrong * weight, axis=1, dtype=np.float64)
        recall = right / (category.objects @ counts)
        precision = right / (right + wrong + np.spacing(1))
        # The best precision at this recall or a greater one.
        best = np.maximum.accumulate(precision[:, ::-1], axis=1)[:, ::-1]
        means = []
        for at, values in zip(recall, best, strict=True):
            places = np.searchsorted(at, self.recalls, side="left")
            reached = places[places < len(values)]
            means.append(values[reached].sum() / len(self.recalls))
        return np.array(means)


def collect_matches(scores: COCOeval) -> Matches:
    """Return what pycocotools matched on all images: areas of all sizes, 100 detections each."""
    params = scores.params
    images = len(params.imgIds)
    most = params.maxDets[-1]
    categories = []
    for number in range(len(params.catIds)):
        first = number * len(params.areaRng) * images
        found = [
            (image, one)
            for image, one in enumerate(scores.evalImgs[first : first + images])
            if one is not None
        ]
        objects = np.zeros(images, dtype=np.int64)
        for image, one in found:
            objects[image] = np.count_nonzero(np.asarray(one["gtIgnore"]) == 0)
        if not found or not objects.any():
            continue
        order = np.argsort(
            -np.concatenate([one["dtScores"][:most] for _, one in found]), kind="mergesort"
        )
        matched = np.concatenate([one["dtMatches"][:, :most] for _, one in found], axis=1)
        ignored = np.concatenate([one["dtIgnore"][:, :most] for _, one in found], axis=1)
        right = np.logical_and(matched, np.logical_not(ignored))
        wrong = np.logical_and(np.logical_not(matched), np.logical_not(ignored))
        numbers = np.concatenate([np.full(len(one["dtScores"][:most]), i) for i, one in found])
        categories.append(
            CategoryMatches(numbers[order], right[:, order], wrong[:, order], objects)
        )
    overlaps = np.asarray(params.iouThrs)
    return Matches(
        images=params.imgIds,
        categories=categories,
        recalls=np.asarray(params.recThrs),
        half=int(np.argmin(abs(overlaps - 0.5))),
        three_quarters=int(np.argmin(abs(overlaps - 0.75))),
    )


def match_detections(annotations: Path, results: Sequence[dict[str, Any]], code: str) -> COCOeval:
    """Return pycocotools' evaluation with the detections of each image matched to its objects."""
    # pycocotools takes the area of a box if there is one, which would sort masks into wrong sizes.
    left_out = "segmentation" if code == "bbox" else "bbox"
    entries = [{k: v for k, v in one.items() if k != left_out} for one in results]
    with contextlib.redirect_stdout(io.StringIO()):
        truth = COCO(str(annotations))
        scores = COCOeval(truth, truth.loadRes(entries), code)
        scores.evaluate()
    return scores


def run_coco_eval(annotations: Path, results: Sequence[dict[str, Any]], code: str) -> list[float]:
    """Return the twelve figures of pycocotools for "bbox" or "segm"."""
    if not results:  # pycocotools cannot load an empty list
        return [0.0] * 12
    scores = match_detections(annotations, results, code)
    with contextlib.redirect_stdout(io.StringIO()) as printed:
        scores.accumulate()
        scores.summarize()
    logger.info("%s\n%s", code, printed.getvalue())
    return [float(value) for value in scores.stats]
