"""Images that do not lie in class folders: named by a list, or without labels."""

import hashlib
import json
from collections import Counter
from collections.abc import Sequence
from pathlib import Path, PurePosixPath

from mugs.data.sources.base import EXTENSIONS, FolderSource, SourceError, raise_if_any

NO_LABEL = -1


class ListedSource(FolderSource):
    """Images below `root` in the given order, with labels of their own; NO_LABEL and no classes for none."""

    by_folder = False

    def __init__(self, root: Path, paths: list[str], labels: list[int], classes: list[str]) -> None:
        self.root, self.paths, self.labels, self.classes = root, paths, labels, classes

    @property
    def fingerprint(self) -> str:
        """Hash of paths, sizes, labels and classes."""
        content = json.dumps([super().fingerprint, self.labels, self.classes])
        return hashlib.sha256(content.encode()).hexdigest()


def open_images(
    root: Path, list_file: Path | None = None, *, labelled: bool = True
) -> FolderSource:
    """The images of a split: those a list names, else all below `root`. Raises SourceError naming what is wrong."""
    if not root.is_dir():
        raise SourceError(f"{root}: not a folder")
    if list_file is not None:
        return from_list(root, list_file, labelled=labelled)
    return FolderSource(root) if labelled else without_labels(root)


def without_labels(root: Path) -> ListedSource:
    """All images directly in `root` or in folders below it, sorted."""
    paths = sorted(
        p.relative_to(root).as_posix() for p in root.rglob("*") if p.suffix.lower() in EXTENSIONS
    )
    if not paths:
        raise SourceError(f"{root}: no images in it or below it")
    return ListedSource(root, paths, [NO_LABEL] * len(paths), [])


def from_list(root: Path, list_file: Path, *, labelled: bool = True) -> ListedSource:
    """The images a text file names, in its order: a path relative to `root` a line, or path, space, label.

    A label is the name of a class. Without one the class is the first folder of the path. Labels are numbered in the
    order of the class names; as numbers where all of them are.
    """
    try:
        lines = [
            line.strip()
            for line in list_file.read_text(encoding="utf-8").splitlines()
            if line.strip()
        ]
    except (OSError, UnicodeDecodeError) as error:
        raise SourceError(f"{list_file}: cannot be read as a list of files: {error}") from error
    if not lines:
        raise SourceError(f"{list_file}: names no file")
    found = [parse_line(root, line) for line in lines]
    lost = [line for line, entry in zip(lines, found, strict=True) if not entry]
    raise_if_any(list_file, f"of its lines name no file below {root}", lost)
    entries = [entry for entry in found if entry]
    paths = [path for path, _ in entries]
    raise_if_any(
        list_file,
        "of its lines name a file again",
        [path for path, count in Counter(paths).items() if count > 1],
    )
    if not labelled:
        return ListedSource(root, paths, [NO_LABEL] * len(paths), [])
    names = class_names(list_file, entries)
    numeric = all(name.isdecimal() for name in names)
    classes = sorted(set(names), key=lambda name: (int(name) if numeric else 0, name))
    number = {name: index for index, name in enumerate(classes)}
    return ListedSource(root, paths, [number[name] for name in names], classes)


def parse_line(root: Path, line: str) -> tuple[str, str] | None:
    """Path and label ("" for none) of a line; None when it names no file below `root`."""
    head, *last = line.rsplit(maxsplit=1)
    for path, label in ((line, ""), (head, last[0] if last else "")):
        pure = PurePosixPath(path)
        if not pure.is_absolute() and ".." not in pure.parts and (root / pure).is_file():
            return pure.as_posix(), label
    return None


def class_names(list_file: Path, entries: Sequence[tuple[str, str]]) -> list[str]:
    """The class of each entry: its label, or the first folder of its path when no entry has a label."""
    if any(label for _, label in entries):
        raise_if_any(
            list_file,
            "of its lines carry no label, others do",
            [path for path, label in entries if not label],
        )
        return [label for _, label in entries]
    bare = [path for path, _ in entries if "/" not in path]
    raise_if_any(
        list_file,
        "of its lines carry neither a label nor a class folder (num_classes: 0 for no labels)",
        bare,
    )
    return [path.split("/")[0] for path, _ in entries]
