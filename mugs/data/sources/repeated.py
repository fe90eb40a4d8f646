"""Images that are in a data set more than once, by their content."""

from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence

from mugs.data.sources.beton import Sidecar

Content = tuple[int, int]
"""Size and CRC-32 of a stored image: of a million images, two are alike by chance once in 10,000
data sets or less.
"""


def describe_repeated(sidecars: Mapping[str, Sidecar]) -> list[str]:
    """Return a line for images of two classes, and for validation images that are trained on."""
    lines = []
    contents = {split: dict(_classes_by_content(sidecar)) for split, sidecar in sidecars.items()}
    for split, classes in contents.items():
        if several := sum(len(names) > 1 for names in classes.values()):
            lines.append(f"{split}: {several:,} images are in more than one class, by content")
    if {"train", "val"} <= contents.keys():
        val = sidecars["val"]
        pairs = zip(val.sizes, val.crc32, strict=True)
        if both := sum(pair in contents["train"] for pair in pairs):
            lines.append(f"val: {both:,} of {len(val.sizes):,} images are training images as well")
    return lines


def _classes_by_content(sidecar: Sidecar) -> Iterator[tuple[Content, set[object]]]:
    """Yield each content with its classes; none for images without labels."""
    found: dict[Content, set[object]] = defaultdict(set)
    folders = [name.partition("/")[0] for name in sidecar.names]
    labels: Sequence[object] = folders if sidecar.labels is None else sidecar.labels
    for label, size, crc32 in zip(labels, sidecar.sizes, sidecar.crc32, strict=True):
        found[size, crc32].add(label)
    yield from found.items()
