"""Where images come from: the interface of a source, its errors, and which files are images."""

import os
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from pathlib import Path, PurePosixPath
from typing import Any, BinaryIO, NamedTuple, Protocol

from PIL import Image

from pipeline.files import open_regular_file

# Of all formats that Pillow knows, those of these names, and GIF, which public data sets have under
# such names: it would start Ghostscript for a PostScript file, whatever its name.
FORMATS = ("JPEG", "PNG", "PPM", "BMP", "TIFF", "WEBP", "GIF")
# Those of torchvision's ImageFolder.
EXTENSIONS = (".jpg", ".jpeg", ".png", ".ppm", ".bmp", ".pgm", ".tif", ".tiff", ".webp")
# More than any image that Pillow reads can have.
MAX_IMAGE_BYTES = 1 << 30
# Of many files or problems, how many a message names.
MAX_NAMED = 5


class SourceError(ValueError):
    """A data set cannot be read; the message names the file or folder."""


def format_names(names: Sequence[str]) -> str:
    """Return the first few names or problems as text for a message."""
    return ", ".join(names[:MAX_NAMED]) + (", ..." if len(names) > MAX_NAMED else "")


def is_name_below(name: str) -> bool:
    """Return whether a name in a list or an annotation stays below the folder that it is in."""
    pure = PurePosixPath(name)
    return not pure.is_absolute() and ".." not in pure.parts and "\0" not in name


@contextmanager
def open_image(file: Path | BinaryIO) -> Iterator[Image.Image]:
    """Open an image and read its header; raises OSError for anything but a regular image file."""
    if not isinstance(file, Path):
        with Image.open(file, formats=FORMATS) as image:
            yield image
        return
    # A pipe or a device in its place would be read without end.
    with (
        open(open_regular_file(file), "rb") as stream,
        Image.open(stream, formats=FORMATS) as image,
    ):
        yield image


class FileStamp(NamedTuple):
    """Size and modification time of a file: what tells cheaply that it was changed."""

    size: int = 0
    mtime_ns: int = 0


class StoredImage(Protocol):
    """Where an encoded image is: small enough to be sent to another process, which reads it."""

    def read(self) -> bytes:
        """Return the encoded image."""


@dataclass(frozen=True)
class FilePart:
    """A whole file, or `size` bytes of it from `start` on."""

    path: str
    start: int = 0
    size: int | None = None

    def read(self) -> bytes:
        """Return the bytes, fewer where the file ends before."""
        if self.size is None:
            return Path(self.path).read_bytes()
        # By a system call and not through a memory map: a page fault would hold up all threads, as
        # it happens with the interpreter lock held, and kill the process if the file became
        # shorter.
        return os.pread(_open_once(self.path), self.size, self.start)


@cache
def _open_once(path: str) -> int:
    # A file of many images stays open: opening is the slow part on a network file system.
    return os.open(path, os.O_RDONLY)


@dataclass(frozen=True)
class ImageInMemory:
    """An encoded image that lies in no file."""

    data: bytes

    def read(self) -> bytes:
        """Return the encoded image."""
        return self.data


class Source(Protocol):
    """Encoded images with labels and names, by index."""

    classes: list[str]

    def __len__(self) -> int: ...
    def read(self, index: int) -> bytes:
        """Return the encoded image."""

    def locate(self, index: int) -> StoredImage:
        """Return where the encoded image is, for another process to read it."""

    def label(self, index: int) -> int:
        """Return the class index."""

    def name(self, index: int) -> str:
        """Return the path relative to the original folder."""

    def describe(self, index: int) -> str:
        """Return where a sample lies, for messages."""

    @property
    def fingerprint(self) -> str:
        """Hash of the content."""


def is_image_name(name: str) -> bool:
    """Return whether a file is an image by its name."""
    # macOS keeps what other file systems cannot hold of a file x.jpg in ._x.jpg (AppleDouble).
    # The suffix is found as pathlib does, which takes 3 seconds for the names of ImageNet.
    dot = name.rfind(".")
    known = 0 < dot < len(name) - 1 and name[dot:].lower() in EXTENSIONS
    return known and not name.startswith("._")


def list_by_suffix(folder: Path, suffix: str) -> list[Path]:
    """Return the images of one suffix in a folder, sorted."""
    return sorted(path for path in folder.glob(f"*{suffix}") if is_image_name(path.name))


def is_encodable(name: str) -> bool:
    """Return whether a name is text, and not bytes that Python keeps as lone surrogates."""
    try:
        name.encode()
    except UnicodeEncodeError:
        return False
    return True


def count_skipped(names: Iterable[str]) -> dict[str, int]:
    """Return how many of the skipped files have which suffix; `._*` are those of macOS."""
    kinds = Counter(
        "._*" if name.startswith("._") else PurePosixPath(name).suffix.lower() or "no suffix"
        for name in names
    )
    return dict(sorted(kinds.items()))


OUTSIDE = "beside the class folders"
"""Kind of skipped files that are images, but of no class."""


def describe_skipped(counts: Mapping[str, int]) -> str:
    """Return a line about files that were skipped by their names, or by where they lie."""
    by_name = {kind: count for kind, count in counts.items() if kind != OUTSIDE}
    kinds = [f"{count:,} {kind}" for kind, count in by_name.items()]
    parts = []
    if by_name:
        total = sum(by_name.values())
        parts.append(f"{total:,} files are no images by name: {format_names(kinds)}")
    if OUTSIDE in counts:
        parts.append(f"{counts[OUTSIDE]:,} images lie {OUTSIDE} and are left out")
    return "; ".join(parts)


def find_repeated(values: Iterable[Any]) -> list[str]:
    """Return each value that is there more than once, as text."""
    return [str(value) for value, count in Counter(values).items() if count > 1]


def raise_if_any(where: object, what: str, bad: Sequence[str]) -> None:
    """Raise SourceError naming the first of what is wrong, if anything is."""
    if bad:
        raise SourceError(f"{where}: {len(bad)} {what}: {format_names(bad)}")
