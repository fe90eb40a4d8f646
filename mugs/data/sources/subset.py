"""A labeled part of a data set: named by a list of files, or drawn class by class from a seed."""

import hashlib
from collections import Counter, defaultdict
from collections.abc import Sequence
from pathlib import Path, PurePosixPath

from mugs.data.sources.base import Source, SourceError, StoredImage, raise_if_any
from mugs.data.sources.listing import read_lines
from mugs.random_streams import ClassStream, make_item_generator

LISTS = "https://github.com/google-research/simclr/tree/master/imagenet_subsets"
# Lines of SimCLRv2's lists, by data set and percent.
KNOWN_LINES = {("imagenet1k", 1.0): 12_811, ("imagenet1k", 10.0): 128_116}


class Subset:
    """Some samples of a source, in the given order; it is a source itself."""

    def __init__(self, source: Source, indices: Sequence[int]) -> None:
        self.source = source
        self.indices = list(indices)
        self.classes = source.classes

    def __len__(self) -> int:
        return len(self.indices)

    def read(self, index: int) -> bytes:
        """Return the encoded image."""
        return self.source.read(self.indices[index])

    def locate(self, index: int) -> StoredImage:
        """Return where the encoded image is, for another process to read it."""
        return self.source.locate(self.indices[index])

    def label(self, index: int) -> int:
        """Return the class index."""
        return self.source.label(self.indices[index])

    def name(self, index: int) -> str:
        """Return the path relative to the original folder."""
        return self.source.name(self.indices[index])

    def describe(self, index: int) -> str:
        """Return where a sample lies, for messages."""
        return self.source.describe(self.indices[index])

    @property
    def fingerprint(self) -> str:
        """Hash of the names in order."""
        names = "\n".join(self.name(i) for i in range(len(self)))
        return hashlib.sha256(names.encode()).hexdigest()


def indices_from_list(
    source: Source, list_file: Path, *, lines: int | None = None, drop_last: bool = False
) -> list[int]:
    """Return the indices, sorted, of the images that a text file names.

    A line is a file name, or a path relative to the data set's root. Raises SourceError naming the
    lines that are wrong.

    Args:
        source: the data set.
        list_file: the text file.
        lines: number of lines that there must be.
        drop_last: leave the last image out, as the release does with its 10% list (128,115
            instead of 128,116 images, E7).
    """
    names = read_names(list_file)
    # The release's copy of the 1% list ends with a stray letter, on the last line or on one of its
    # own (E7).
    last = names[-1]
    where = locate_names(source, {*names, last[:-1]})
    if last not in where and last[:-1] in where:
        names[-1] = last[:-1]
    elif last not in where and len(last) == 1:
        names.pop()
    if lines is not None and len(names) != lines:
        raise SourceError(
            f"{list_file}: names {len(names)} images, {lines} expected; fetch it again from {LISTS}"
        )
    raise_if_any(
        list_file,
        "of its lines name no image of the data set",
        [name for name in names if name not in where],
    )
    raise_if_any(
        list_file,
        "of its lines are the name of several images; give paths",
        [name for name in names if len(where[name]) > 1],
    )
    indices = [where[name][0] for name in names]
    again = [source.name(i) for i, count in Counter(indices).items() if count > 1]
    raise_if_any(list_file, "of its lines name an image again", again)
    if drop_last:
        indices.pop()
    _check_every_class(source, indices, list_file)
    return sorted(indices)


def read_names(list_file: Path) -> list[str]:
    """Return the lines that are not empty. Raises SourceError if there are none."""
    lines = read_lines(list_file, f"; those of ImageNet-1K are at {LISTS}")
    return [line.removeprefix("./") for line in lines]


def locate_names(source: Source, names: set[str]) -> dict[str, list[int]]:
    """Return the indices of each name that is a path, or the last part of a path, in the source."""
    # One pass over the source: the release scans its list for every image (E22).
    found = defaultdict(list)
    for index in range(len(source)):
        path = source.name(index)
        for name in {path, PurePosixPath(path).name} & names:
            found[name].append(index)
    return dict(found)


def draw_class_balanced(source: Source, percent: float, *, seed: int) -> list[int]:
    """Return the indices, sorted, of `percent` of each class, rounded, at least one image.

    With one seed, a smaller part lies inside a larger one.
    """
    members = defaultdict(list)
    for index in range(len(source)):
        members[source.label(index)].append(index)
    chosen: list[int] = []
    for label, indices in sorted(members.items()):
        # The first images of one permutation per class: so 1% is part of 10%.
        rng = make_item_generator(seed, label, ClassStream.SUBSET)
        count = max(1, round(percent / 100 * len(indices)))
        chosen += [indices[i] for i in rng.permutation(len(indices))[:count].tolist()]
    _check_every_class(source, chosen, f"{percent:g}% of each class")
    return sorted(chosen)


def _check_every_class(source: Source, indices: Sequence[int], where: object) -> None:
    present = {source.label(i) for i in indices}
    absent = [name for label, name in enumerate(source.classes) if label not in present]
    raise_if_any(where, f"of {len(source.classes)} classes have no image in it", absent)
