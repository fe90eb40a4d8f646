"""Where images come from: the interface of a source, and folders with one folder per class."""

import hashlib
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Protocol

EXTENSIONS = (".jpg", ".jpeg", ".png", ".ppm", ".bmp", ".webp", ".tif", ".tiff")
# The last bytes of a JPEG file (end of image) and of a PNG file (name and checksum of its last
# chunk).
FILE_ENDS = (b"\xff\xd9", b"IEND\xaeB`\x82")
# Of many files or problems, how many a message names.
MAX_NAMED = 5


class SourceError(ValueError):
    """A data set cannot be read; the message names the file or folder."""


def format_names(names: Sequence[str]) -> str:
    """Return the first few names or problems as text for a message."""
    return ", ".join(names[:MAX_NAMED]) + (", ..." if len(names) > MAX_NAMED else "")


def ends_whole(path: Path) -> bool:
    """Return whether a file ends as a JPEG or PNG does.

    A file that does not may still be whole (other formats, bytes after the end): decode it to know.
    """
    try:
        with path.open("rb") as stream:
            stream.seek(-min(8, stream.seek(0, os.SEEK_END)), os.SEEK_END)
            return stream.read().endswith(FILE_ENDS)
    except OSError:
        return False


class Source(Protocol):
    """Encoded images with labels and names, by index."""

    classes: list[str]

    def __len__(self) -> int: ...
    def read(self, index: int) -> bytes:
        """Return the encoded image."""

    def label(self, index: int) -> int:
        """Return the class index."""

    def name(self, index: int) -> str:
        """Return the path relative to the original folder."""

    def describe(self, index: int) -> str:
        """Return where a sample lies, for messages."""

    @property
    def fingerprint(self) -> str:
        """Hash of the content."""


class FolderSource:
    """Images `root/class/image`; classes and images are sorted as torchvision sorts them.

    `by_folder` tells whether a class is the first folder of a path. Raises SourceError for a folder
    without images in class folders.
    """

    by_folder = True

    def __init__(self, root: Path) -> None:
        if not root.is_dir():
            raise SourceError(f"{root}: not a folder")
        self.root = root
        self.classes = sorted(p.name for p in root.iterdir() if p.is_dir())
        if not self.classes:
            raise SourceError(
                f"{root}: no class folders in it (expected {root}/<class>/<image>)"
                f"{suggest_layout(root)}"
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
        # An empty class folder is more likely a failed copy than intended, and nothing later would
        # notice.
        if empty:
            raise SourceError(
                f"{root}: class folders without images: {', '.join(empty)}; "
                "remove them or add images"
            )

    def __len__(self) -> int:
        return len(self.paths)

    def read(self, index: int) -> bytes:
        """Return the encoded image."""
        return (self.root / self.paths[index]).read_bytes()

    def size(self, index: int) -> int:
        """Return the size of the file in bytes, 0 for a link that leads nowhere."""
        path = self.root / self.paths[index]
        return path.stat().st_size if path.exists() else 0

    def ends_whole(self, index: int) -> bool:
        """Return whether the file ends as a JPEG or PNG does."""
        return ends_whole(self.root / self.paths[index])

    def label(self, index: int) -> int:
        """Return the class index."""
        return self.labels[index]

    def name(self, index: int) -> str:
        """Return the path relative to the folder."""
        return self.paths[index]

    def describe(self, index: int) -> str:
        """Return where a sample lies, for messages."""
        return str(self.root / self.paths[index])

    @property
    def fingerprint(self) -> str:
        """Hash of paths and sizes."""
        # Not of the content, which would mean reading the whole data set each time.
        digest = hashlib.sha256()
        for index, name in enumerate(self.paths):
            digest.update(f"{name}\0{self.size(index)}\n".encode())
        return digest.hexdigest()


def suggest_layout(root: Path) -> str:
    """Return what a folder without class folders holds and what to do about it, for a message."""
    suffixes = [p.suffix.lower() for p in root.iterdir() if p.is_file()]
    if tars := suffixes.count(".tar"):
        # ImageNet's training images come as a .tar file of 1,000 .tar files.
        return f", but {tars} .tar files: unpack each into a folder of its name"
    if images := sum(suffix in EXTENSIONS for suffix in suffixes):
        return (
            f", but {images} images directly in it: move them into class folders, give a list of "
            "paths and labels, or set num_classes: 0 for images without labels"
        )
    return ""


def raise_if_any(where: object, what: str, bad: Sequence[str]) -> None:
    """Raise SourceError naming the first of what is wrong, if anything is."""
    if bad:
        raise SourceError(f"{where}: {len(bad)} {what}: {format_names(bad)}")
