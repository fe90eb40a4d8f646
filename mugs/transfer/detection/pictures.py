"""Pictures of detections: boxes and masks over the image, beside the annotated objects."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageDraw, ImageFont
from pycocotools import mask as rle

from mugs.data.dense.coco import CocoSplit
from mugs.data.dense.pictures import label_colors, save_png, side_by_side

MASK_OPACITY = 0.5
MIN_WIDTH = 320  # smaller images are enlarged, so that the text can be read
# Thickness of lines and size of text, as shares of the width of the picture.
LINES_PER_WIDTH = 160
TEXT_PER_WIDTH = 18
CAPTION = (
    "Left: the annotated objects. Right: as many detections as there are annotated objects, those "
    "with the highest scores. Each object has a box, a mask and its name in the color of its class."
)


def draw_pictures(split: CocoSplit, detections: Path, folder: Path, num: int) -> list[Path]:
    """Write one PNG file for each of the first `num` images: annotated and detected objects.

    Of the detections, the best are drawn, as many as there are objects. A fixed score would show
    almost nothing of a detector whose scores are low but well ordered: AP measures the order.
    """
    found: dict[int, list[dict[str, Any]]] = {image.number: [] for image in split.images[:num]}
    for one in json.loads(detections.read_bytes()):
        if one["image_id"] in found:
            found[one["image_id"]].append(one)
    paths = []
    for index, entry in enumerate(split.images[:num]):
        pixels = split.read(index).permute(1, 2, 0).numpy()
        path = folder / f"{Path(entry.file).stem}.png"
        annotated = list_annotated(split, index)
        best = sorted(found[entry.number], key=lambda one: -one["score"])[: len(annotated)]
        pair = [
            draw_objects(pixels, annotated),
            draw_objects(pixels, [parse_detection(split, one) for one in best]),
        ]
        save_png(path, side_by_side(pair))
        paths.append(path)
    return paths


DrawnObject = tuple[int, str, Sequence[float], np.ndarray]
"""Label, text, box (x1, y1, x2, y2) and mask (H, W)."""


def list_annotated(split: CocoSplit, index: int) -> list[DrawnObject]:
    """Return the annotated objects of an image that count in the evaluation."""
    boxes, labels, masks = split.objects(index)
    names = [split.names[split.categories[label]] for label in labels.tolist()]
    return list(
        zip(labels.tolist(), names, boxes.tolist(), list(masks.numpy().astype(bool)), strict=True)
    )


def parse_detection(split: CocoSplit, one: dict[str, Any]) -> DrawnObject:
    """Read a detection in COCO's format."""
    x, y, width, height = one["bbox"]
    text = f"{split.names[one['category_id']]} {one['score']:.2f}"
    mask = np.asarray(rle.decode(one["segmentation"])).astype(bool)
    return split.categories.index(one["category_id"]), text, (x, y, x + width, y + height), mask


def draw_objects(pixels: np.ndarray, objects: Sequence[DrawnObject]) -> np.ndarray:
    """Draw masks, boxes and names over an image (H, W, 3); a small image is enlarged."""
    # Color 0 is black, which would be invisible as a mask: class k has color k + 1.
    table = label_colors()
    mixed = pixels.astype(np.float32)
    for label, _, _, mask in objects:
        mixed[mask] = (1 - MASK_OPACITY) * mixed[mask] + MASK_OPACITY * table[label % 255 + 1]

    # Lines and text are drawn after enlarging, so that they stay sharp.
    scale = max(1, -(-MIN_WIDTH // pixels.shape[1]))
    small = Image.fromarray(mixed.round().astype(np.uint8))
    picture = small.resize((small.width * scale, small.height * scale), Image.Resampling.NEAREST)
    pen = ImageDraw.Draw(picture)
    font = ImageFont.load_default(size=max(10, picture.width // TEXT_PER_WIDTH))
    line = max(1, picture.width // LINES_PER_WIDTH)
    for label, text, box, _ in objects:
        light = tuple((128 + table[label % 255 + 1] // 2).tolist())
        x1, y1, x2, y2 = (value * scale for value in box)
        pen.rectangle((x1, y1, max(x2 - 1, x1), max(y2 - 1, y1)), outline=light, width=line)
        pen.text(
            (x1 + 2 * line, y1 + line),
            text,
            fill=(255, 255, 255),
            font=font,
            stroke_width=1,
            stroke_fill=(0, 0, 0),
        )
    return np.asarray(picture)
