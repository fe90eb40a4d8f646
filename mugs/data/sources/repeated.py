"""Images that are in a data set more than once, by their content."""

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from mugs.data.sources.beton import Sidecar


@dataclass(frozen=True)
class StoredContents:
    """What tells the images of a file apart, in 16 bytes for each.

    images: size and CRC-32 of each stored image, as one number. Of a million images, two are alike
        by chance once in 10,000 data sets or less.
    classes: the number of its class.
    """

    images: np.ndarray
    classes: np.ndarray


def read_contents(sidecar: Sidecar) -> StoredContents:
    """Return the contents of a converted file from its sidecar."""
    num = len(sidecar.names)
    # The CRC takes the lower half; no image has 2 GB.
    images = np.fromiter(sidecar.sizes, np.int64, num) << 32
    images |= np.fromiter(sidecar.crc32, np.int64, num)
    if sidecar.labels is not None:
        return StoredContents(images, np.fromiter(sidecar.labels, np.int64, num))
    # Folders are numbered as they come.
    numbers: dict[str, int] = {}
    folders = (name.partition("/")[0] for name in sidecar.names)
    classes = (numbers.setdefault(folder, len(numbers)) for folder in folders)
    return StoredContents(images, np.fromiter(classes, np.int64, num))


def describe_repeated(contents: Mapping[str, StoredContents]) -> list[str]:
    """Return a line for images of two classes, and for validation images that are trained on."""
    lines = []
    for split, found in contents.items():
        if several := _count_in_several_classes(found):
            lines.append(f"{split}: {several:,} images are in more than one class, by content")
    if {"train", "val"} <= contents.keys():
        val = contents["val"].images
        if both := int(np.isin(val, contents["train"].images).sum()):
            lines.append(f"val: {both:,} of {len(val):,} images are training images as well")
    return lines


def _count_in_several_classes(contents: StoredContents) -> int:
    """Return how many contents have images in more than one class."""
    order = np.lexsort((contents.classes, contents.images))
    images = contents.images[order]
    classes = contents.classes[order]
    same_image = images[1:] == images[:-1]
    changes = same_image & (classes[1:] != classes[:-1])
    return len(np.unique(images[1:][changes]))
