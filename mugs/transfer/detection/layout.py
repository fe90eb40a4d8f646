"""Whether a folder holds the COCO it is said to hold, asked before GPUs are spent."""

from pathlib import Path

from PIL import Image

from mugs.data.ahead import Report, ahead, counted
from mugs.data.decode import DecodeError
from mugs.data.layout import Layout
from mugs.data.source import SourceError, ends_whole, listed
from mugs.transfer.detection.coco import SPLITS, CocoSplit


def check_coco(
    root: Path, expected: Layout, *, threads: int = 4, report: Report = lambda done, total: None
) -> dict[str, CocoSplit]:
    """Both splits, every image there, of the annotated size and not cut short, every outline well formed.

    Raises SourceError, in one line, with all that is wrong with either.
    """
    splits: dict[str, CocoSplit] = {}
    problems: list[str] = []
    for name in SPLITS:
        try:
            splits[name] = CocoSplit(root, name)
        except SourceError as error:
            problems.append(f"{name}: {error}")
    bad = _bad_images(splits, threads, report)
    for name, split in splits.items():
        problems += [
            f"{name}: {line}"
            for line in _counts(split, expected, (expected.images or {}).get(name))
        ]
        if bad[name]:
            problems.append(
                f"{name}: {len(bad[name])} images are not as annotated: {listed(bad[name])}"
            )
    if len(splits) == 2 and splits["train"].names != splits["val"].names:
        problems.append("train and val have different categories")
    if problems:
        raise SourceError(f"{root} is not as expected: {'; '.join(problems)}")
    return splits


def _bad_images(splits: dict[str, CocoSplit], threads: int, report: Report) -> dict[str, list[str]]:
    """What is wrong with the images of each split."""
    places = [(name, index) for name, split in splits.items() for index in range(len(split))]
    lines = counted(
        ahead(lambda place: _problem(splits[place[0]], place[1]), places, threads),
        len(places),
        report,
    )
    bad: dict[str, list[str]] = {name: [] for name in splits}
    for (name, _), line in zip(places, lines, strict=True):
        bad[name] += [line] if line else []
    return bad


def _counts(split: CocoSplit, expected: Layout, images: int | None) -> list[str]:
    found = {
        "categories": (len(split.categories), expected.classes),
        "images": (len(split), images),
    }
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
    except (OSError, SyntaxError, Image.DecompressionBombError) as error:
        return f"{entry.file} ({error})"
    try:
        if not ends_whole(path):
            split.read(index)
        split.objects(index)
    except (DecodeError, SourceError) as error:
        return str(error)
    return None
