"""What a file of annotations in COCO's layout has to hold; checked whole before any of it is used.

pycocotools checks nothing. An annotation with the id 0, for example, counts as "no match" there, so
detections that are the truth score an AP of 72; of an image that is listed twice, the last entry
counts in one place and both in another.
"""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

from mugs.data.sources.base import SourceError, find_repeated, format_names

Entry = Mapping[str, Any]


def _is_id(value: Any) -> bool:
    # True is an integer to Python.
    return type(value) is int


def _is_annotation_id(value: Any) -> bool:
    # pycocotools writes the id of the matched annotation into an array of zeros.
    return _is_id(value) and value != 0


def _is_count(value: Any) -> bool:
    return type(value) is int and value > 0


def _is_text(value: Any) -> bool:
    return isinstance(value, str) and value != ""


def _is_file(value: Any) -> bool:
    if not _is_text(value):
        return False
    path = PurePosixPath(value)
    return not path.is_absolute() and ".." not in path.parts


def _as_path(value: str) -> str:
    return PurePosixPath(value).as_posix()


def _is_number(value: Any) -> bool:
    return type(value) in (int, float) and math.isfinite(value)


def _is_box(value: Any) -> bool:
    return (
        isinstance(value, list)
        and len(value) == 4
        and all(map(_is_number, value))
        and value[2] >= 0
        and value[3] >= 0
    )


def _is_flag(value: Any) -> bool:
    return value in (0, 1)


def _is_outline(value: Any) -> bool:
    # Whether it is well formed shows when it is decoded.
    return any(value) if isinstance(value, list) else bool(value)


@dataclass(frozen=True)
class Key:
    """A key that each entry of a list needs, and what its value has to be."""

    name: str
    is_right: Callable[[Any], bool]
    expected: str


ID = Key("id", _is_id, "a whole number")
KEYS = {
    "categories": (ID, Key("name", _is_text, "a text")),
    "images": (
        ID,
        Key("file_name", _is_file, "a path below the folder of the images"),
        Key("width", _is_count, "a whole number above 0"),
        Key("height", _is_count, "a whole number above 0"),
    ),
    "annotations": (
        Key("id", _is_annotation_id, "a whole number other than 0 (number them from 1)"),
        Key("image_id", _is_id, "a whole number"),
        Key("category_id", _is_id, "a whole number"),
        Key("bbox", _is_box, "x, y, width and height, four numbers, none of the sides negative"),
        Key("area", _is_number, "a number"),
        Key("iscrowd", _is_flag, "0 or 1 (0 for a single object)"),
        Key("segmentation", _is_outline, "polygons or a run-length code, not empty"),
    ),
}


def check_annotation_file(path: Path, content: Any) -> None:
    """Raise SourceError, in one line, with all kinds of mistakes in the content of `path`."""
    # What refers to what can only be asked of entries that have their keys.
    problems = _find_bad_lists(content) or _find_bad_entries(content) or _find_bad_links(content)
    if problems:
        raise SourceError(f"{path}: {'; '.join(problems)}")


def _find_bad_lists(content: Any) -> list[str]:
    if not isinstance(content, Mapping):
        return [f"expected an object with the lists {', '.join(KEYS)} (COCO's annotations)"]
    problems = []
    for name in KEYS:
        entries = content.get(name)
        if not isinstance(entries, list) or not all(isinstance(one, Mapping) for one in entries):
            problems.append(f"expected {name!r} to be a list of objects")
    return problems


def _find_bad_entries(content: Mapping[str, Any]) -> list[str]:
    problems = []
    for name, keys in KEYS.items():
        for key in keys:
            bad = [
                f"{_describe(entry, place)} has {_value(entry, key.name)}"
                for place, entry in enumerate(content[name])
                if key.name not in entry or not key.is_right(entry[key.name])
            ]
            if bad:
                problems.append(
                    f"{len(bad)} {name} whose {key.name} is not {key.expected}: {format_names(bad)}"
                )
    return problems


def _describe(entry: Entry, place: int) -> str:
    # The place as well: ids may be what is wrong, and one that is there twice tells little.
    return f"number {place + 1} (id {entry['id']!r})" if "id" in entry else f"number {place + 1}"


def _value(entry: Entry, key: str) -> str:
    return f"{entry[key]!r:.60}" if key in entry else "none"


def _find_bad_links(content: Mapping[str, Any]) -> list[str]:
    images = content["images"]
    categories = content["categories"]
    annotations = content["annotations"]
    problems = []
    for what, entries, key in (
        ("images", images, "id"),
        ("images", images, "file_name"),
        ("categories", categories, "id"),
        ("categories", categories, "name"),
        ("annotations", annotations, "id"),
    ):
        # "./a.jpg" and "a.jpg" are one file.
        values = [_as_path(entry[key]) if key == "file_name" else entry[key] for entry in entries]
        if again := find_repeated(values):
            problems.append(
                f"{len(again)} {what} are listed twice, by {key}: {format_names(again)}"
            )
    for key, known in (
        ("image_id", {image["id"] for image in images}),
        ("category_id", {category["id"] for category in categories}),
    ):
        lost = [entry for entry in annotations if entry[key] not in known]
        if lost:
            named = [f"annotation {entry['id']} has {entry[key]}" for entry in lost]
            problems.append(
                f"{len(lost)} annotations whose {key} is not in the file: {format_names(named)}"
            )
    return problems
