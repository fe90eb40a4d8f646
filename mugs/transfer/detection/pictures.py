"""Detections with boxes and masks drawn over their images, beside the truth."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageDraw, ImageFont
from pycocotools import mask as rle

from mugs.data.dense.coco import CocoSplit
from mugs.data.dense.pictures import label_colors, save_png, side_by_side

OPACITY = 0.5
MIN_SCORE = 0.3
MIN_WIDTH = 320  # smaller images are shown enlarged, so that the text can be read
LINES, TEXT = (
    160,
    18,
)  # widths of the picture that give the thickness of a line and the size of the text
CAPTION = (
    f"Left the truth, right what was found with a score of at least {MIN_SCORE}: box, mask and name of each object, "
    "in the colour of its class, and the score."
)


def draw_pictures(split: CocoSplit, detections: Path, folder: Path, num: int) -> list[Path]:
    """One PNG file for each of the first `num` images: the truth, and what was found with a score of at least 0.3."""
    found: dict[int, list[dict[str, Any]]] = {image.number: [] for image in split.images[:num]}
    for one in json.loads(detections.read_bytes()):
        if one["image_id"] in found and one["score"] >= MIN_SCORE:
            found[one["image_id"]].append(one)
    paths = []
    for index, entry in enumerate(split.images[:num]):
        pixels = split.read(index).permute(1, 2, 0).numpy()
        path = folder / f"{Path(entry.file).stem}.png"
        pair = [
            draw_objects(pixels, list_annotated(split, index)),
            draw_objects(pixels, [parse_detection(split, one) for one in found[entry.number]]),
        ]
        save_png(path, side_by_side(pair))
        paths.append(path)
    return paths


DrawnObject = tuple[int, str, Sequence[float], np.ndarray]
"""Label, text, box (x1, y1, x2, y2) and mask (H, W)."""


def list_annotated(split: CocoSplit, index: int) -> list[DrawnObject]:
    """The objects that count."""
    boxes, labels, masks = split.objects(index)
    names = [split.names[split.categories[label]] for label in labels.tolist()]
    return list(
        zip(labels.tolist(), names, boxes.tolist(), list(masks.numpy().astype(bool)), strict=True)
    )


def parse_detection(split: CocoSplit, one: dict[str, Any]) -> DrawnObject:
    """A detection in COCO's format."""
    x, y, width, height = one["bbox"]
    text = f"{split.names[one['category_id']]} {one['score']:.2f}"
    mask = np.asarray(rle.decode(one["segmentation"])).astype(bool)
    return split.categories.index(one["category_id"]), text, (x, y, x + width, y + height), mask


def draw_objects(pixels: np.ndarray, objects: Sequence[DrawnObject]) -> np.ndarray:
    """Image (H, W, 3) with masks in the colours of their classes, boxes and texts; enlarged where it is small."""
    table, mixed = label_colors(), pixels.astype(np.float32)
    for label, _, _, mask in objects:
        mixed[mask] = (1 - OPACITY) * mixed[mask] + OPACITY * table[label % 255 + 1]
    scale = max(1, -(-MIN_WIDTH // pixels.shape[1]))
    small = Image.fromarray(mixed.round().astype(np.uint8))
    picture = small.resize((small.width * scale, small.height * scale), Image.Resampling.NEAREST)
    pen, font = ImageDraw.Draw(picture), ImageFont.load_default(size=max(10, picture.width // TEXT))
    line = max(1, picture.width // LINES)
    for label, text, box, _ in objects:
        light = tuple((128 + table[label % 255 + 1] // 2).tolist())
        x1, y1, x2, y2 = (value * scale for value in box)
        pen.rectangle((x1, y1, max(x2 - 1, x1), max(y2 - 1, y1)), outline=light, width=line)
        place = (x1 + 2 * line, y1 + line)
        pen.text(
            place, text, fill=(255, 255, 255), font=font, stroke_width=1, stroke_fill=(0, 0, 0)
        )
    return np.asarray(picture)
