"""Where images come from: the interface of a source, and folders with one folder per class."""

import hashlib
import logging
import os
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path, PurePosixPath
from typing import Any, BinaryIO, NamedTuple, Protocol

from PIL import Image

from pipeline.files import open_regular_file

logger = logging.getLogger(__name__)
# Those of torchvision's ImageFolder.
# Of all formats that Pillow knows, those of these names: it would start Ghostscript for a
# PostScript file, whatever its name.
FORMATS = ("JPEG", "PNG", "PPM", "BMP", "TIFF", "WEBP")
EXTENSIONS = (".jpg", ".jpeg", ".png", ".ppm", ".bmp", ".pgm", ".tif", ".tiff", ".webp")
# The last bytes of a JPEG file (end of image) and of a PNG file (name and checksum of its last
# chunk).
FILE_ENDS = (b"\xff\xd9", b"IEND\xaeB`\x82")
# Pillow refuses images of more than 179 million pixels. A JPEG file has at least a bit for each
# block of 64 of them, which makes 350 kB; a PNG file is at most 1,032 times smaller than its
# pixels, of a bit at least, which makes 22 kB. Smaller files need no look at their header.
SMALLEST_HUGE_FILE = {FILE_ENDS[0]: 300_000, FILE_ENDS[1]: 20_000}
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


def ends_whole(path: Path) -> bool:
    """Return whether a file ends as a JPEG or PNG does, and is no larger than Pillow reads.

    A file that does not may still be whole (other formats, bytes after the end): decode it to know.
    """
    try:
        with open(open_regular_file(path), "rb") as stream:
            size = stream.seek(0, os.SEEK_END)
            stream.seek(-min(8, size), os.SEEK_END)
            last = stream.read()
            ending = next((end for end in FILE_ENDS if last.endswith(end)), None)
            if ending is None:
                return False
            return size < SMALLEST_HUGE_FILE[ending] or _has_known_header(stream)
    except OSError:
        return False


def _has_known_header(stream: BinaryIO) -> bool:
    """Return whether Pillow takes a file for an image, of no more pixels than it reads."""
    stream.seek(0)
    try:
        with open_image(stream):
            return True
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError):
        return False


class FileStamp(NamedTuple):
    """Size and modification time of a file: what tells cheaply that it was changed."""

    size: int = 0
    mtime_ns: int = 0


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
    skipped: Mapping[str, int] = {}
    """How many files of which kind were no images by their names (`count_skipped`)."""

    def __init__(self, root: Path) -> None:
        if not root.is_dir():
            raise SourceError(f"{root}: not a folder")
        self.root = root
        found, self.skipped = list_images(root)
        # A folder without images is a class too, which is refused below.
        self.classes = sorted(
            p.name for p in root.iterdir() if p.is_dir() and not is_machine_made(p.name)
        )
        if not self.classes:
            raise SourceError(
                f"{root}: no class folders in it (expected {root}/<class>/<image>)"
                f"{suggest_layout(root)}"
            )
        self.paths: list[str] = []
        self.labels: list[int] = []
        empty: list[str] = []
        members: dict[str, list[str]] = {name: [] for name in self.classes}
        for path in found:
            folder, *below = path.split("/", maxsplit=1)
            if below:
                members[folder].append(path)
        for label, folder in enumerate(self.classes):
            self.paths += members[folder]
            self.labels += [label] * len(members[folder])
            if not members[folder]:
                empty.append(folder)
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

    def read_with_stamp(self, index: int) -> tuple[bytes, FileStamp]:
        """Return the encoded image, and the stamp of the file as it was opened."""
        with (self.root / self.paths[index]).open("rb", buffering=0) as stream:
            found = os.fstat(stream.fileno())
            return stream.read(), FileStamp(found.st_size, found.st_mtime_ns)

    def stamp(self, index: int) -> FileStamp:
        """Return size and time of the file; zeros for a link that leads nowhere."""
        try:
            found = os.stat(f"{self.root}/{self.paths[index]}")
        except FileNotFoundError:
            return FileStamp()
        return FileStamp(found.st_size, found.st_mtime_ns)

    def size(self, index: int) -> int:
        """Return the size of the file in bytes, 0 for a link that leads nowhere."""
        return self.stamp(index).size

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
        return self.fingerprint_of(self.size(index) for index in range(len(self)))

    def fingerprint_of(self, sizes: Iterable[int]) -> str:
        """Return the fingerprint if the files have these sizes."""
        # Not of the content, which would mean reading the whole data set each time.
        digest = hashlib.sha256()
        for name, size in zip(self.paths, sizes, strict=True):
            digest.update(f"{name}\0{size}\n".encode())
        return digest.hexdigest()


def is_machine_made(folder: str) -> bool:
    """Return whether programs make folders of this name for themselves: hidden ones, `@eaDir`."""
    # .ipynb_checkpoints, .git; @eaDir holds the thumbnails of Synology disk stations.
    return folder.startswith(".") or folder == "@eaDir"


def list_images(root: Path) -> tuple[list[str], dict[str, int]]:
    """Return the images below `root`, relative to it, in torchvision's order; links are followed.

    Machine-made folders and files that are no images by their names are skipped. One line of the
    log names the folders, the second result counts the files by kind. Raises SourceError for links
    that lead in a circle, and for folders that cannot be read.
    """
    images: dict[str, list[str]] = {}
    skipped: list[str] = []
    others: list[str] = []

    def visit(folder: str, above: frozenset[tuple[int, int]]) -> None:
        path = root / folder
        status = path.stat()
        identity = (status.st_dev, status.st_ino)
        if identity in above:
            raise SourceError(f"{path}: a link to a folder above it, so images repeat without end")
        below = []
        images[folder] = names = []
        with os.scandir(path) as entries:
            for entry in entries:
                if not entry.is_dir():
                    names.append(entry.name)
                elif is_machine_made(entry.name):
                    skipped.append(f"{folder}/{entry.name}".lstrip("/"))
                else:
                    below.append(entry.name)
        images[folder] = sorted(name for name in names if is_image_name(name))
        others.extend(name for name in names if not is_image_name(name))
        for name in below:
            visit(f"{folder}/{name}".lstrip("/"), above | {identity})

    try:
        visit("", frozenset())
    except OSError as error:
        raise SourceError(f"{error.filename or root}: not readable ({error.strerror})") from error
    if skipped:
        logger.info(
            "%s: %d hidden folders and @eaDir skipped: %s",
            root,
            len(skipped),
            format_names(sorted(skipped)),
        )
    counts = count_skipped(others)
    if counts:
        logger.info("%s: %s", root, describe_skipped(counts))
    # The files of a folder come before those of the folders in it.
    paths = [f"{folder}/{name}".lstrip("/") for folder in sorted(images) for name in images[folder]]
    return paths, counts


def is_image_name(name: str) -> bool:
    """Return whether a file is an image by its name."""
    # macOS keeps what other file systems cannot hold of a file x.jpg in ._x.jpg (AppleDouble).
    return not name.startswith("._") and PurePosixPath(name).suffix.lower() in EXTENSIONS


def list_by_suffix(folder: Path, suffix: str) -> list[Path]:
    """Return the images of one suffix in a folder, sorted."""
    return sorted(path for path in folder.glob(f"*{suffix}") if is_image_name(path.name))


def count_skipped(names: Iterable[str]) -> dict[str, int]:
    """Return how many of the skipped files have which suffix; `._*` are those of macOS."""
    kinds = Counter(
        "._*" if name.startswith("._") else PurePosixPath(name).suffix.lower() or "no suffix"
        for name in names
    )
    return dict(sorted(kinds.items()))


def describe_skipped(counts: Mapping[str, int]) -> str:
    """Return a line about files that were skipped by their names."""
    kinds = [f"{count:,} {kind}" for kind, count in counts.items()]
    return f"{sum(counts.values()):,} files are no images by name: {format_names(kinds)}"


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


def find_repeated(values: Iterable[Any]) -> list[str]:
    """Return each value that is there more than once, as text."""
    return [str(value) for value, count in Counter(values).items() if count > 1]


def raise_if_any(where: object, what: str, bad: Sequence[str]) -> None:
    """Raise SourceError naming the first of what is wrong, if anything is."""
    if bad:
        raise SourceError(f"{where}: {len(bad)} {what}: {format_names(bad)}")
