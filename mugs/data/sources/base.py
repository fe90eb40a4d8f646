"""Where images come from: a folder of class folders, or a `.beton` file."""

import hashlib
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Protocol

EXTENSIONS = (".jpg", ".jpeg", ".png", ".ppm", ".bmp", ".webp", ".tif", ".tiff")
ENDS = (b"\xff\xd9", b"IEND\xaeB`\x82")  # of a JPEG, of a PNG
NAMED = 5  # of many files or problems, how many a message names


class SourceError(ValueError):
    """A data set cannot be read; the message names the file or folder."""


def format_names(names: Sequence[str]) -> str:
    """The first of some names or problems, for a message."""
    return ", ".join(names[:NAMED]) + (", ..." if len(names) > NAMED else "")


def ends_whole(path: Path) -> bool:
    """Whether a file ends as a JPEG or PNG does. What does not may be whole all the same: decode it to know."""
    try:
        with path.open("rb") as stream:
            stream.seek(-min(8, stream.seek(0, os.SEEK_END)), os.SEEK_END)
            return stream.read().endswith(ENDS)
    except OSError:
        return False


class Source(Protocol):
    """Encoded images with labels and names, by index."""

    classes: list[str]

    def __len__(self) -> int: ...
    def read(self, index: int) -> bytes:
        """Encoded image bytes."""

    def label(self, index: int) -> int:
        """Class index."""

    def name(self, index: int) -> str:
        """Path relative to the original folder."""

    def describe(self, index: int) -> str:
        """Where a sample lies, for messages."""

    @property
    def fingerprint(self) -> str:
        """Hash of what the data set holds."""


class FolderSource:
    """`root/class/image`, classes and images sorted as torchvision does. `by_folder`: the class is the folder."""

    by_folder = True

    def __init__(self, root: Path) -> None:
        if not root.is_dir():
            raise SourceError(f"{root}: not a folder")
        self.root = root
        self.classes = sorted(p.name for p in root.iterdir() if p.is_dir())
        if not self.classes:
            raise SourceError(
                f"{root}: no class folders in it (expected {root}/<class>/<image>){suggest_layout(root)}"
            )
        self.paths: list[str] = []
        self.labels: list[int] = []
        empty: list[str] = []
        for label, folder in enumerate(self.classes):
            found = sorted(p for p in (root / folder).rglob("*") if p.suffix.lower() in EXTENSIONS)
            if not found:
                empty.append(folder)
            self.paths += [p.relative_to(root).as_posix() for p in found]
            self.labels += [label] * len(found)
        if empty:
            raise SourceError(
                f"{root}: class folders without images: {', '.join(empty)}; remove them or add images"
            )

    def __len__(self) -> int:
        return len(self.paths)

    def read(self, index: int) -> bytes:
        """Encoded image bytes."""
        return (self.root / self.paths[index]).read_bytes()

    def size(self, index: int) -> int:
        """Bytes of the file; 0 for a link that leads nowhere."""
        path = self.root / self.paths[index]
        return path.stat().st_size if path.exists() else 0

    def ends_whole(self, index: int) -> bool:
        """As the function of that name, of an image."""
        return ends_whole(self.root / self.paths[index])

    def label(self, index: int) -> int:
        """Class index."""
        return self.labels[index]

    def name(self, index: int) -> str:
        """Path relative to the folder."""
        return self.paths[index]

    def describe(self, index: int) -> str:
        """Where a sample lies, for messages."""
        return str(self.root / self.paths[index])

    @property
    def fingerprint(self) -> str:
        """Hash of paths and sizes."""
        digest = hashlib.sha256()
        for index, name in enumerate(self.paths):
            digest.update(f"{name}\0{self.size(index)}\n".encode())
        return digest.hexdigest()


def suggest_layout(root: Path) -> str:
    """What a folder without class folders holds, and what to do about it; for a message."""
    suffixes = [p.suffix.lower() for p in root.iterdir() if p.is_file()]
    if tars := suffixes.count(".tar"):
        return f", but {tars} .tar files: unpack each into a folder of its name"
    images = sum(suffix in EXTENSIONS for suffix in suffixes)
    if images:
        return (
            f", but {images} images directly in it: move them into class folders, name a list of paths and labels, "
            "or say num_classes: 0 for images without labels"
        )
    return ""


def raise_if_any(where: object, what: str, bad: Sequence[str]) -> None:
    """SourceError naming the first of what is wrong, if anything is."""
    if bad:
        raise SourceError(f"{where}: {len(bad)} {what}: {format_names(bad)}")
