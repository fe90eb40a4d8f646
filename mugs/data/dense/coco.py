"""Images and objects in COCO's layout.

    <root>/train2017/*.jpg      <root>/annotations/instances_train2017.json
    <root>/val2017/*.jpg        <root>/annotations/instances_val2017.json

Boxes are x1, y1, x2, y2 in pixels. Classes are counted from 0 in the order of the category ids,
which have gaps in COCO.
"""

import itertools
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from pycocotools import mask as rle
from torch import Tensor

from mugs.data.dense.coco_schema import check_annotation_file
from mugs.data.dense.read_image import read_rgb_tensor
from mugs.data.prefetch import ProgressCallback, ignore_progress, map_prefetched, with_progress
from mugs.data.sources.base import SourceError, format_names, is_name_below, open_image
from mugs.data.sources.decode import DecodeError
from mugs.data.sources.expected import ExpectedCounts
from mugs.data.sources.scan import ends_whole
from pipeline.files import replace_atomically

SPLITS = {"train": "train2017", "val": "val2017"}
# Boxes of COCO are those around the outlines. If boxes are given by other corners, or outlines in
# shares of the image, most overlap less.
LEAST_AGREEMENT = 0.5


@dataclass(frozen=True)
class CocoImage:
    """One image: its id, file, size in pixels, and places of its objects among those of the split.

    annotated: whether it has annotations, of crowds for example, that need not count.
    """

    number: int
    file: str
    width: int
    height: int
    objects: range
    annotated: bool

    @property
    def size(self) -> tuple[int, int]:
        """Height and width."""
        return self.height, self.width


class CocoSplit:
    """One split, ordered by image id. Raises SourceError if files or parts of them are missing.

    Only objects that count are kept, in a table of tensors: annotation ids, classes, boxes within
    the image, and COCO's outlines as JSON. With `table`, a file that `write_table` of another
    process wrote, the annotations are not parsed: all processes of a node share its memory.
    """

    def __init__(self, root: Path, split: str, *, table: Path | None = None) -> None:
        self.folder = root / SPLITS[split]
        self.annotations = root / "annotations" / f"instances_{SPLITS[split]}.json"
        for path, there in (
            (self.folder, self.folder.is_dir()),
            (self.annotations, self.annotations.is_file()),
        ):
            if not there:
                raise SourceError(
                    f"{path}: not there (expected <root>/{SPLITS[split]}/*.jpg and "
                    f"<root>/annotations/{self.annotations.name})"
                )
        try:
            content = self._parse() if table is None else torch.load(table, mmap=True)
        except SourceError:
            # A ValueError too, but it says already what is wrong.
            raise
        except (ValueError, RecursionError) as error:
            raise SourceError(
                f"{self.annotations}: not COCO annotations ({type(error).__name__}: {error})"
            ) from error

        # How far boxes that `find_problem` looked at are those around the outlines (IoU).
        self.agreements: list[float] = []
        self.table = content
        self.names: dict[int, str] = content["names"]
        self.categories = sorted(self.names)
        # Crowds, for example; `usable_box` has the rule.
        self.num_uncounted: int = content["uncounted"]
        self.images = [
            CocoImage(number, file, width, height, range(first, stop), annotated)
            for number, file, width, height, first, stop, annotated in content["images"]
        ]

    def _parse(self) -> dict[str, Any]:
        content = json.loads(self.annotations.read_bytes())
        check_annotation_file(self.annotations, content)
        names = {category["id"]: category["name"] for category in content["categories"]}
        labels = {category: label for label, category in enumerate(sorted(names))}
        images = {image["id"]: image for image in content["images"]}
        sizes = {number: (image["width"], image["height"]) for number, image in images.items()}
        found: dict[int, list[tuple[Any, ...]]] = {number: [] for number in images}
        annotated = set()
        for entry in content["annotations"]:
            image = entry["image_id"]
            annotated.add(image)
            box = usable_box(entry, *sizes[image])
            if box is not None:
                outline = json.dumps(entry["segmentation"]).encode()
                found[image].append((entry["id"], labels[entry["category_id"]], box, outline))
        rows = []
        stop = 0
        for number in sorted(images):
            first, stop = stop, stop + len(found[number])
            file = images[number]["file_name"]
            if not is_name_below(file):
                raise SourceError(
                    f"image {number} is named {file!r}, which is not below its folder"
                )
            rows.append((number, file, *sizes[number], first, stop, number in annotated))
        objects = [one for number in sorted(images) for one in found[number]]
        outlines = b"".join(one[3] for one in objects)
        return {
            "names": names,
            "images": rows,
            "uncounted": len(content["annotations"]) - len(objects),
            "annotations": torch.tensor([one[0] for one in objects], dtype=torch.long),
            "labels": torch.tensor([one[1] for one in objects], dtype=torch.long),
            "boxes": torch.tensor([one[2] for one in objects], dtype=torch.float32).view(-1, 4),
            "ends": torch.tensor([0, *(len(one[3]) for one in objects)]).cumsum(0),
            "outlines": torch.from_numpy(np.frombuffer(bytearray(outlines), np.uint8)),
        }

    def write_table(self, path: Path) -> None:
        """Write what other processes open this split with."""
        with replace_atomically(path) as temporary:
            torch.save(self.table, temporary)

    def __len__(self) -> int:
        return len(self.images)

    def read(self, index: int) -> Tensor:
        """Return uint8 pixels (3, H, W). Raises DecodeError and SourceError naming the file."""
        entry = self.images[index]
        path = self.folder / entry.file
        try:
            image = read_rgb_tensor(path)
        except OSError as error:
            raise SourceError(f"{path}: cannot be read ({error})") from error
        _, height, width = image.shape
        if (height, width) != entry.size:
            raise SourceError(
                f"{path}: {width} x {height} pixels, {self.annotations.name} says "
                f"{entry.width} x {entry.height}"
            )
        return image

    def objects(self, index: int) -> tuple[Tensor, Tensor, Tensor]:
        """Return boxes (n, 4), labels (n,) and bitmaps uint8 (n, H, W).

        Raises SourceError naming file and annotation.
        """
        entry = self.images[index]
        masks = torch.zeros(len(entry.objects), *entry.size, dtype=torch.uint8)
        for mask, place in zip(masks, entry.objects, strict=True):
            first, stop = self.table["ends"][place : place + 2].tolist()
            outline = json.loads(self.table["outlines"][first:stop].numpy().tobytes())
            try:
                mask.copy_(torch.from_numpy(decode_outline(outline, *entry.size)))
            except (ValueError, TypeError, KeyError, AttributeError, RuntimeError) as error:
                # pycocotools raises all of these for an outline that is not well formed.
                raise SourceError(
                    f"{self.annotations}: annotation {self.table['annotations'][place]} of "
                    f"{entry.file} has no usable outline ({error})"
                ) from error
        own = slice(entry.objects.start, entry.objects.stop)
        return self.table["boxes"][own].clone(), self.table["labels"][own].clone(), masks

    def find_problem(self, index: int) -> str | None:
        """Return what is wrong with an image or its annotations, naming the file, or None."""
        entry = self.images[index]
        path = self.folder / entry.file
        # Opening reads the header only. Decoding takes far longer, so only files that do not end as
        # an image does are decoded.
        try:
            with open_image(path) as image:
                width, height = image.size
            if (height, width) != entry.size:
                return (
                    f"{entry.file} ({width} x {height}, annotated {entry.width} x {entry.height})"
                )
        except FileNotFoundError:
            return f"{entry.file} (missing)"
        except (OSError, SyntaxError, Image.DecompressionBombError) as error:
            return f"{entry.file} ({error})"
        try:
            if not ends_whole(path):
                self.read(index)
            boxes, _, masks = self.objects(index)
        except (DecodeError, SourceError) as error:
            return str(error)
        self.agreements += map(compare_box, boxes.tolist(), masks.numpy())
        return None

    def describe_disagreement(self) -> str:
        """Return what is wrong if most boxes looked at are not those of their outlines, or ""."""
        bad = sum(agreement < LEAST_AGREEMENT for agreement in self.agreements)
        if 2 * bad <= len(self.agreements):
            return ""
        return (
            f"{self.annotations.name}: {bad} of {len(self.agreements)} boxes are not where their "
            "outlines are (a bbox is x, y of the upper left corner, width and height; outlines are "
            "in pixels)"
        )


def compare_box(box: Sequence[float], mask: np.ndarray) -> float:
    """Return the overlap (IoU) of a box and the box around a bitmap (H, W); 0 for an empty one."""
    rows = np.flatnonzero(mask.any(axis=1))
    columns = np.flatnonzero(mask.any(axis=0))
    if not len(rows):
        return 0.0
    around = (columns[0], rows[0], columns[-1] + 1, rows[-1] + 1)
    left, top, right, bottom = (
        pick(one, other) for pick, one, other in zip((max, max, min, min), box, around, strict=True)
    )
    shared = max(0.0, right - left) * max(0.0, bottom - top)
    areas = [(b[2] - b[0]) * (b[3] - b[1]) for b in (box, around)]
    return float(shared / (sum(areas) - shared))


def usable_box(
    entry: dict[str, Any], width: int, height: int
) -> tuple[float, float, float, float] | None:
    """Return the box of an annotation, cut at the image, or None for one that does not count.

    Crowds, areas of 0, sides below one pixel and boxes outside the image do not count
    (mmdetection's rule).
    """
    # COCO writes boxes as x, y, width and height; some reach beyond the image.
    x, y, w, h = (float(v) for v in entry["bbox"])
    box = max(x, 0.0), max(y, 0.0), min(x + w, float(width)), min(y + h, float(height))
    if entry.get("iscrowd") or entry.get("ignore") or entry["area"] <= 0 or w < 1 or h < 1:
        return None
    return box if box[2] > box[0] and box[3] > box[1] else None


def decode_outline(outline: Any, height: int, width: int) -> np.ndarray:
    """Return polygons, or a run-length code, as a bitmap uint8 (height, width)."""
    if isinstance(outline, dict):
        encoded = outline
        # Run lengths come as a list of numbers or compressed to text.
        if isinstance(outline["counts"], list):
            _check_counts(outline["counts"], height * width)
            encoded = rle.frPyObjects(outline, height, width)
        if list(encoded["size"]) != [height, width]:
            raise ValueError(
                f"it is {encoded['size'][1]} x {encoded['size'][0]} pixels, "
                f"its image {width} x {height}"
            )
        return np.asarray(rle.decode(encoded))
    if not isinstance(outline, list) or not all(isinstance(polygon, list) for polygon in outline):
        raise ValueError("neither polygons nor a run-length code")
    # Polygons of less than three points enclose nothing.
    polygons = [polygon for polygon in outline if len(polygon) >= 6]
    if any(len(polygon) % 2 for polygon in polygons):
        raise ValueError("a polygon with an odd number of coordinates")
    # The compiled code takes memory for each pixel of an edge, and crashes where it gets none.
    most = 10 * max(height, width) + 1000
    for value in itertools.chain.from_iterable(polygons):
        if type(value) not in (int, float) or not abs(value) <= most:
            raise ValueError(f"a polygon with a coordinate far outside: {str(value)[:40]}")
    if not polygons:
        return np.zeros((height, width), np.uint8)
    return np.asarray(rle.decode(rle.merge(rle.frPyObjects(polygons, height, width))))


def _check_counts(counts: list[Any], pixels: int) -> None:
    """Raise ValueError unless run lengths have so many pixels: compiled code trusts them."""
    if not all(type(count) is int and count >= 0 for count in counts) or sum(counts) != pixels:
        raise ValueError(f"run lengths that are not those of {pixels} pixels")


def trainable_indices(split: CocoSplit, min_side: int) -> list[int]:
    """Return the annotated images with no side below `min_side` pixels.

    Those whose annotations do not count, of crowds for example, stay as background (released).
    """
    images = enumerate(split.images)
    return [index for index, image in images if image.annotated and min(image.size) >= min_side]


def check_coco(
    root: Path,
    expected: ExpectedCounts,
    *,
    threads: int = 4,
    report: ProgressCallback = ignore_progress,
) -> dict[str, CocoSplit]:
    """Open and return both splits, and check every image and outline.

    Images must be there, have the annotated size and not be cut short; outlines must be well
    formed. Raises SourceError, in one line, with all that is wrong with either split.
    """
    splits: dict[str, CocoSplit] = {}
    problems: list[str] = []
    for name in SPLITS:
        try:
            splits[name] = CocoSplit(root, name)
        except SourceError as error:
            problems.append(f"{name}: {error}")
    places = [(name, index) for name, split in splits.items() for index in range(len(split))]
    lines = map_prefetched(lambda place: splits[place[0]].find_problem(place[1]), places, threads)
    found = list(zip(places, with_progress(lines, len(places), report), strict=True))
    for name, split in splits.items():
        differences = _count_differences(split, expected, (expected.images or {}).get(name))
        bad = [line for (part, _), line in found if line and part == name]
        if bad:
            differences.append(f"{len(bad)} images are not as annotated: {format_names(bad)}")
        if disagreement := split.describe_disagreement():
            differences.append(disagreement)
        problems += [f"{name}: {difference}" for difference in differences]
    # Labels are positions among the categories, so both splits must have the same ones.
    if len(splits) == 2 and splits["train"].names != splits["val"].names:
        problems.append("train and val have different categories")
    if problems:
        raise SourceError(f"{root} is not as expected: {'; '.join(problems)}")
    return splits


def _count_differences(split: CocoSplit, expected: ExpectedCounts, images: int | None) -> list[str]:
    lines = [
        f"{split.annotations.name} has {have} {what}, {want} expected"
        for what, have, want in (
            ("categories", len(split.categories), expected.classes),
            ("images", len(split), images),
        )
        if want not in (None, have)
    ]
    if not any(image.objects for image in split.images):
        lines.append(f"{split.annotations.name} has no object that counts")
    return lines
