"""Whether a folder holds the COCO it is said to hold, asked before GPUs are spent."""

from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from PIL import Image, UnidentifiedImageError

from mugs.data.convert import Report, ahead
from mugs.data.source import SourceError
from mugs.transfer.detection.coco import CocoSplit, listed


@dataclass(frozen=True)
class CocoLayout:
    """Number of classes, and of images by split; what is None is not asked for."""

    classes: int | None = None
    images: Mapping[str, int | None] | None = None

    def or_known(self, dataset: str) -> "CocoLayout":
        """With what is None taken from the data set of that name, if it is a known one."""
        known = KNOWN.get(dataset, CocoLayout())
        images = {**(known.images or {}), **{k: v for k, v in (self.images or {}).items() if v is not None}}
        return CocoLayout(known.classes if self.classes is None else self.classes, images)


KNOWN = {"coco2017": CocoLayout(80, {"train": 118_287, "val": 5_000})}


def check_coco(
    root: Path, expected: CocoLayout, *, threads: int = 4, report: Report | None = None
) -> dict[str, CocoSplit]:
    """Both splits, every image there and of the size the annotations give it, every outline well formed.

    Raises SourceError, in one line, with all that is wrong with either.
    """
    splits: dict[str, CocoSplit] = {}
    problems: list[str] = []
    for split in ("train", "val"):
        try:
            splits[split] = CocoSplit(root, split)
        except SourceError as error:
            problems.append(f"{split}: {error}")
    for name, found in splits.items():
        lines = _counts(found, expected, (expected.images or {}).get(name))
        problems += [f"{name}: {line}" for line in lines + _bad_images(found, threads, report)]
    if len(splits) == 2 and splits["train"].names != splits["val"].names:
        problems.append("train and val have different categories")
    if problems:
        raise SourceError(f"{root} is not as expected: {'; '.join(problems)}")
    return splits


def _bad_images(split: CocoSplit, threads: int, report: Report | None) -> list[str]:
    bad = []
    for done, problem in enumerate(ahead(partial(_problem, split), range(len(split)), threads), 1):
        if problem is not None:
            bad.append(problem)
        if report is not None:
            report(done, len(split))
    return [f"{len(bad)} images are not as annotated: {listed(bad)}"] if bad else []


def _counts(split: CocoSplit, expected: CocoLayout, images: int | None) -> list[str]:
    found = {"categories": (len(split.categories), expected.classes), "images": (len(split), images)}
    lines = [
        f"{split.annotations.name} has {have} {what}, {want} expected"
        for what, (have, want) in found.items()
        if want not in (None, have)
    ]
    if not any(image.objects for image in split.images):
        lines.append(f"{split.annotations.name} has no object that counts")
    return lines


def _problem(split: CocoSplit, index: int) -> str | None:
    entry = split.images[index]
    path = split.folder / entry.file
    try:
        with Image.open(path) as image:
            if image.size != (entry.width, entry.height):
                return f"{entry.file} ({image.width} x {image.height}, annotated {entry.width} x {entry.height})"
    except FileNotFoundError:
        return f"{entry.file} (missing)"
    except (OSError, SyntaxError, UnidentifiedImageError, Image.DecompressionBombError) as error:
        return f"{entry.file} ({error})"
    try:
        split.objects(index)
    except SourceError as error:
        return str(error)
    return None
