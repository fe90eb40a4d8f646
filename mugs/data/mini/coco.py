"""scikit-learn's handwritten digits as a mini COCO: scenes, boxes, outlines and categories."""

import json
from pathlib import Path
from typing import Any

import numpy as np
from numpy.random import Generator
from PIL import Image

from mugs.data.dense.coco import SPLITS
from mugs.data.mini.scenes_and_videos import (
    BODY,
    draw_dark_noise,
    load_digit_split,
    paste_digit,
    scale_digit,
)
from mugs.data.mini.write_once import write_once
from mugs.random_streams import DemoStream, make_item_generator

# Height and width of a scene; smallest and largest side of a digit (the latter excluded).
SIZES = ((96, 96), (80, 112), (112, 80))
SIDES = (28, 44)


@write_once
def materialize_coco(root: Path, *, train: int, val: int, seed: int = 0) -> None:
    """Write scenes of digits below root, if not there; no digit is in both splits."""
    (root / "annotations").mkdir(parents=True)
    for split, count, stream in (
        ("train", train, DemoStream.TRAIN_COCO),
        ("val", val, DemoStream.VAL_COCO),
    ):
        (root / SPLITS[split]).mkdir()
        digits, labels = load_digit_split(split)
        images: list[dict[str, Any]] = []
        annotations: list[dict[str, Any]] = []
        for index in range(1, count + 1):
            light, found = draw_coco_scene(digits, labels, make_item_generator(seed, index, stream))
            name = f"{index:012d}.jpg"
            Image.fromarray(light).convert("RGB").save(root / SPLITS[split] / name, quality=95)
            height, width = light.shape
            images.append({"id": index, "file_name": name, "width": width, "height": height})
            annotations += [
                {"id": number, "image_id": index, **entry}
                for number, entry in enumerate(found, len(annotations) + 1)
            ]
        content = {
            "images": images,
            "annotations": annotations,
            "categories": [{"id": digit + 1, "name": str(digit)} for digit in range(10)],
        }
        (root / "annotations" / f"instances_{SPLITS[split]}.json").write_text(
            json.dumps(content), encoding="utf-8"
        )


def draw_coco_scene(
    digits: np.ndarray, labels: np.ndarray, rng: Generator
) -> tuple[np.ndarray, list[dict[str, Any]]]:
    """Draw a dark picture with one to four digits side by side; return it and their annotations."""
    height, width = SIZES[rng.integers(len(SIZES))]
    light = draw_dark_noise(height, width, rng)
    wanted = int(rng.integers(1, 5))
    taken = np.zeros((height, width), bool)
    found: list[dict[str, Any]] = []
    # Random places until enough are free. The limit ends the search when the picture is full.
    for _ in range(20 * wanted):
        if len(found) == wanted:
            break
        chosen = int(rng.integers(len(digits)))
        size = int(rng.integers(*SIDES))
        top = int(rng.integers(0, height - size + 1))
        left = int(rng.integers(0, width - size + 1))
        place = taken[top : top + size, left : left + size]
        if place.any():
            continue
        place[:] = True
        shape = scale_digit(digits[chosen], size)
        paste_digit(light, shape, top, left)
        found.append(annotate_digit(shape > BODY, int(labels[chosen]), top, left))
    return light, found


def annotate_digit(body: np.ndarray, digit: int, top: int, left: int) -> dict[str, Any]:
    """Return COCO's fields of a digit at (top, left); its outline is the hull of its body."""
    from scipy.spatial import ConvexHull

    rows, columns = np.nonzero(body)
    # The hull of the corners of all pixels, as a pixel at (x, y) covers x to x + 1 and y to y + 1.
    corners = np.concatenate(
        [np.stack([columns + x, rows + y], axis=1) for x in (0, 1) for y in (0, 1)]
    )
    hull = ConvexHull(corners)
    outline = (corners[hull.vertices] + [left, top]).astype(float)
    low = outline.min(axis=0)
    high = outline.max(axis=0)
    return {
        "category_id": digit + 1,
        "bbox": [*low.tolist(), *(high - low).tolist()],
        # In two dimensions scipy's "volume" is the area.
        "area": float(hull.volume),
        "iscrowd": 0,
        "segmentation": [outline.flatten().tolist()],
    }
