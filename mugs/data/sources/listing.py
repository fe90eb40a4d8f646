"""Images that do not lie in class folders: named by a list, or without labels."""

import hashlib
import json
from collections import Counter
from collections.abc import Iterable, Sequence
from pathlib import Path, PurePosixPath

import numpy as np

from mugs.data.sources.base import SourceError, is_name_below, raise_if_any
from mugs.data.sources.folder import FolderSource
from mugs.data.sources.scan import Scan, scan_images
from pipeline.files import read_bounded

NO_LABEL = -1
# Bytes. A list of ImageNet has 60 MB.
LONGEST_LIST = 1 << 30


class ListedSource(FolderSource):
    """Images below `root` in the given order, with labels of their own.

    Without labels, all are NO_LABEL and there are no classes.
    """

    by_folder = False

    def __init__(
        self,
        root: Path,
        paths: list[str],
        labels: list[int],
        classes: list[str],
        scan: Scan | None = None,
    ) -> None:
        self.root = root
        self.paths = paths
        self.labels = labels
        self.classes = classes
        self.scan = scan
        self.positions = np.arange(len(paths))

    def fingerprint_of(self, sizes: Iterable[int]) -> str:
        """Return the hash of paths, sizes, labels and classes."""
        # Labels count too: two lists may give the same images different ones.
        content = json.dumps([super().fingerprint_of(sizes), self.labels, self.classes])
        return hashlib.sha256(content.encode()).hexdigest()


def open_images(
    root: Path, list_file: Path | None = None, *, labeled: bool = True, memory: Path | None = None
) -> FolderSource:
    """Return the images of a split: those that a list names, or all below `root`.

    What the folder `memory` remembers of them is reused. Raises SourceError naming what is wrong.
    """
    if not root.is_dir():
        raise SourceError(f"{root}: not a folder")
    if list_file is not None:
        return from_list(root, list_file, labeled=labeled)
    scan = scan_images(root, memory)
    return FolderSource(root, scan) if labeled else without_labels(root, scan)


def without_labels(root: Path, scan: Scan) -> ListedSource:
    """Return all images of a scan, sorted, without labels."""
    paths = scan.list_paths()
    if not paths:
        raise SourceError(f"{root}: no images in it or below it")
    order = sorted(range(len(paths)), key=paths.__getitem__)
    source = ListedSource(
        root, [paths[index] for index in order], [NO_LABEL] * len(paths), [], scan
    )
    source.positions = np.array(order)
    source.skipped = scan.count_skipped()
    return source


def from_list(root: Path, list_file: Path, *, labeled: bool = True) -> ListedSource:
    """Return the images that a text file names, in its order.

    A line is a path relative to `root`, or path, space, label. A label is the name of a class;
    without one the class is the first folder of the path. Classes are numbered in the order of
    their names, by value if all of them are numbers. Raises SourceError naming the lines that are
    wrong.
    """
    lines = read_lines(list_file)
    found = [parse_line(root, line) for line in lines]
    lost = [line for line, entry in zip(lines, found, strict=True) if not entry]
    raise_if_any(list_file, f"of its lines name no file below {root}", lost)
    entries = [entry for entry in found if entry]
    paths = [path for path, _ in entries]
    again = [path for path, count in Counter(paths).items() if count > 1]
    raise_if_any(list_file, "of its lines name a file again", again)
    if not labeled:
        return ListedSource(root, paths, [NO_LABEL] * len(paths), [])
    names = class_names(list_file, entries)
    # Numbers sort by value, so that class 10 does not come between 1 and 2.
    numeric = all(name.isdecimal() for name in names)
    classes = sorted(set(names), key=lambda name: (int(name) if numeric else 0, name))
    number = {name: index for index, name in enumerate(classes)}
    return ListedSource(root, paths, [number[name] for name in names], classes)


def read_lines(list_file: Path, hint: str = "") -> list[str]:
    """Return the lines of a text file that are not empty.

    Raises SourceError if there are none, or with `hint` if the file cannot be read.
    """
    try:
        # Editors on Windows begin a file with a mark that would belong to the first name.
        lines = read_bounded(list_file, LONGEST_LIST).decode("utf-8-sig").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise SourceError(
            f"{list_file}: cannot be read as a list of files: {error}{hint}"
        ) from error
    lines = [line.strip() for line in lines if line.strip()]
    if not lines:
        raise SourceError(f"{list_file}: names no file")
    return lines


def is_file_below(root: Path, name: str) -> bool:
    """Return whether a name in a list or an annotation names a file below a folder."""
    return is_name_below(name) and (root / name).is_file()


def parse_line(root: Path, line: str) -> tuple[str, str] | None:
    """Return path and label ("" for none) of a line; None if it names no file below `root`."""
    # File names may hold spaces. So the whole line is tried as a path first, then all but its last
    # word.
    head, *last = line.rsplit(maxsplit=1)
    for path, label in ((line, ""), (head, last[0] if last else "")):
        if is_file_below(root, path):
            return PurePosixPath(path).as_posix(), label
    return None


def class_names(list_file: Path, entries: Sequence[tuple[str, str]]) -> list[str]:
    """Return the class of each entry: its label, or the first folder if no entry has a label.

    Raises SourceError if some entries have a label and others none, or an entry has neither.
    """
    if any(label for _, label in entries):
        raise_if_any(
            list_file,
            "of its lines carry no label, others do",
            [path for path, label in entries if not label],
        )
        return [label for _, label in entries]
    raise_if_any(
        list_file,
        "of its lines carry neither a label nor a class folder (num_classes: 0 for no labels)",
        [path for path, _ in entries if "/" not in path],
    )
    return [path.split("/")[0] for path, _ in entries]
