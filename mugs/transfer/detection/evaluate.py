"""Detections on a split, over any number of ranks, and COCO's average precision of them."""

import contextlib
import io
import json
import logging
from collections import Counter
from collections.abc import Sequence
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
from mugs.engine.precision import autocast
from mugs.engine.progress import Progress
from mugs.transfer.detection.config import DetectionConfig, Scales
from mugs.transfer.detection.detector import Detector
from mugs.transfer.detection.targets import Detections
from mugs.transfer.detection.views import pad_batch
from pipeline.files import write_atomic

logger = logging.getLogger(__name__)
KINDS = {"box": "bbox", "mask": "segm"}
METRICS = ("AP", "AP50", "AP75")  # the first three of pycocotools' figures


def detect_split(
    model: Detector, split: CocoSplit, config: DetectionConfig, run_dir: Path, device: torch.device
) -> Path | None:
    """Detections on every image, one image at a time, gathered on rank 0: a file in COCO's result format.

    Every rank takes every world-size-th image and writes its own part, so none is done twice; None on other ranks.
    """
    world, rank = distributed.world_size(), distributed.rank()
    mine = range(rank, len(split), world)
    path, quiet = run_dir / "progress.json", not distributed.is_main()
    progress = Progress("detect", len(mine), unit="images", path=path, quiet=quiet)
    found = []
    images = map_prefetched(
        lambda index: load_test_view(split, index, config.scales), mine, config.threads
    )
    model.eval()
    for done, (index, image) in enumerate(zip(mine, images, strict=True), 1):
        entry = split.images[index]
        batch = pad_batch([image], model.pyramid.strides[-1]).to(device)
        with autocast(config.precision, device):
            detections = model.detect(batch, (image.shape[1], image.shape[2]), entry.size)
        found.append(
            {"image_id": entry.number, "objects": to_coco_results(detections, split.categories)}
        )
        progress.update(done)
    progress.close()
    folder = run_dir / "detections"
    folder.mkdir(parents=True, exist_ok=True)
    write_atomic(folder / f"part_{rank:04d}_of_{world:04d}.json", json.dumps(found))
    distributed.barrier()
    if not distributed.is_main():
        return None
    parts = [folder / f"part_{r:04d}_of_{world:04d}.json" for r in range(world)]
    target = run_dir / "detections.json"
    write_atomic(target, json.dumps(merge_parts(parts, split)))
    return target


def load_test_view(split: CocoSplit, index: int, scales: Scales) -> Tensor:
    """Normalised image (3, h, w), shorter side at the test size."""
    size = fit_size(split.images[index].size, scales.test_short_side, scales.max_side)
    return normalize_pixels(resize_image(split.read(index), size))


def to_coco_results(found: Detections, categories: Sequence[int]) -> list[dict[str, Any]]:
    """COCO's fields of each object: box as x, y, width, height, and the mask's run-length code as text."""
    lists = zip(
        found.boxes.tolist(),
        found.scores.tolist(),
        found.labels.tolist(),
        found.masks.cpu(),
        strict=True,
    )
    result = []
    for (x1, y1, x2, y2), score, label, mask in lists:
        code = rle.encode(np.asfortranarray(mask.numpy().astype(np.uint8)))
        outline = {"size": [int(v) for v in code["size"]], "counts": code["counts"].decode("ascii")}
        box = [x1, y1, x2 - x1, y2 - y1]
        result.append(
            {"category_id": categories[label], "score": score, "bbox": box, "segmentation": outline}
        )
    return result


def merge_parts(parts: Sequence[Path], split: CocoSplit) -> list[dict[str, Any]]:
    """All parts as one list of detections. Raises RuntimeError unless every image of the split is there once."""
    images = [image for part in parts for image in json.loads(part.read_bytes())]
    counts, wanted = (
        Counter(image["image_id"] for image in images),
        {image.number for image in split.images},
    )
    wrong = [
        str(number)
        for number in sorted(counts.keys() | wanted)
        if counts[number] != (number in wanted)
    ]
    if wrong:
        raise RuntimeError(
            f"{parts[0].parent}: detections not there exactly once, of images {format_names(wrong)}"
        )
    return [{"image_id": image["image_id"], **one} for image in images for one in image["objects"]]


def compute_average_precision(annotations: Path, detections: Path) -> dict[str, float]:
    """box AP, box AP50, box AP75 and the same of masks, in percent, of pycocotools with at most 100 detections."""
    results = json.loads(detections.read_bytes())
    result: dict[str, float] = {}
    for kind, code in KINDS.items():
        stats = run_coco_eval(annotations, results, code)
        result |= {
            f"{kind} {name}": 100 * value for name, value in zip(METRICS, stats[:3], strict=True)
        }
    return result


def run_coco_eval(annotations: Path, results: Sequence[dict[str, Any]], code: str) -> list[float]:
    """pycocotools' twelve figures for "bbox" or "segm"; zeros where nothing was detected."""
    if not results:
        return [0.0] * 12
    left_out = (
        "segmentation" if code == "bbox" else "bbox"
    )  # with a box, areas of masks would be those of boxes
    entries = [{k: v for k, v in one.items() if k != left_out} for one in results]
    with contextlib.redirect_stdout(io.StringIO()) as printed:
        truth = COCO(str(annotations))
        scores = COCOeval(truth, truth.loadRes(entries), code)
        scores.evaluate()
        scores.accumulate()
        scores.summarize()
    logger.info("%s\n%s", code, printed.getvalue())
    return [float(value) for value in scores.stats]
