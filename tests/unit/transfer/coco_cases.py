"""A tiny COCO on disk, to be spoilt by tests."""

import json
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

SQUARE = [10.0, 10, 30, 10, 30, 30, 10, 30]


def entry(number: int, image: int, **fields: Any) -> dict[str, Any]:
    """A square of 20 x 20 at (10, 10), of category 7, with some fields replaced."""
    square = {
        "bbox": [10.0, 10.0, 20.0, 20.0],
        "area": 400.0,
        "iscrowd": 0,
        "segmentation": [SQUARE],
    }
    return {"id": number, "image_id": image, "category_id": 7, **square, **fields}


def write_coco(
    root: Path,
    annotations: list[dict[str, Any]],
    *,
    sizes: dict[int, tuple[int, int]] | None = None,
) -> Path:
    """Both splits with the same images, (width, height) by id, and categories 3 and 7."""
    sizes = sizes or {1: (60, 40), 2: (40, 60)}
    images = [
        {"id": n, "file_name": f"{n:012d}.jpg", "width": w, "height": h}
        for n, (w, h) in sizes.items()
    ]
    categories = [{"id": 7, "name": "seven"}, {"id": 3, "name": "three"}]
    for split in ("train2017", "val2017"):
        (root / split).mkdir(parents=True, exist_ok=True)
        for number, (width, height) in sizes.items():
            pixels = np.random.default_rng(number).integers(
                0, 255, (height, width, 3), dtype=np.uint8
            )
            Image.fromarray(pixels).save(root / split / f"{number:012d}.jpg")
        path = root / "annotations" / f"instances_{split}.json"
        path.parent.mkdir(exist_ok=True)
        path.write_text(
            json.dumps({"images": images, "annotations": annotations, "categories": categories})
        )
    return root
