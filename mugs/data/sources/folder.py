"""Image folders with one folder per class."""

import hashlib
import os
from collections.abc import Iterable, Mapping, Sequence
from functools import cached_property
from pathlib import Path

import numpy as np

from mugs.data.prefetch import ProgressCallback, ignore_progress, map_in_chunks, with_progress
from mugs.data.sources.base import (
    EXTENSIONS,
    OUTSIDE,
    FilePart,
    FileStamp,
    SourceError,
    StoredImage,
    is_encodable,
)
from mugs.data.sources.scan import (
    THREADS,
    UNKNOWN,
    WHOLE,
    Scan,
    look_at_file,
    scan_images,
)
from pipeline.control import Control


class FolderSource:
    """Images `root/class/image`; classes and images are sorted as torchvision sorts them.

    `by_folder` tells whether a class is the first folder of a path. Raises SourceError for a folder
    without images in class folders.
    """

    by_folder = True
    skipped: Mapping[str, int] = {}
    """How many files of which kind were no images by their names (`count_skipped`)."""

    def __init__(self, root: Path, scan: Scan | None = None) -> None:
        if not root.is_dir():
            raise SourceError(f"{root}: not a folder")
        scan = scan or scan_images(root)
        # A folder without images is a class too, which is refused below.
        self.classes = list(scan.listings[""].below)
        if not self.classes:
            raise SourceError(
                f"{root}: no class folders in it (expected {root}/<class>/<image>)"
                f"{suggest_layout(root)}"
            )
        counts = dict.fromkeys(self.classes, 0)
        positions: dict[str, list[np.ndarray]] = {name: [] for name in self.classes}
        start = 0
        for folder, listing in scan.listings.items():
            if folder:
                label = folder.split("/", maxsplit=1)[0]
                counts[label] += listing.count
                positions[label].append(np.arange(start, start + listing.count))
            start += listing.count
        # An empty class folder is more likely a failed copy than intended, and nothing later would
        # notice.
        if empty := [name for name, count in counts.items() if not count]:
            raise SourceError(
                f"{root}: class folders without images: {', '.join(empty)}; "
                "remove them or add images"
            )
        self.root = root
        self.scan: Scan | None = scan
        self.skipped = scan.count_skipped()
        if beside := scan.listings[""].count:
            self.skipped = {**self.skipped, OUTSIDE: beside}
        self.counts = list(counts.values())
        # Where each image is in the scan.
        self.positions = np.concatenate([part for parts in positions.values() for part in parts])

    # Paths and labels are made when they are asked for: those of ImageNet take a third of a second
    # and 150 MB, and a check of a data set that was seen before needs none of them.
    @cached_property
    def paths(self) -> list[str]:
        """The images relative to the root."""
        if self.scan is None:
            raise AssertionError("a source without scan is given its paths")
        paths = self.scan.list_paths()
        return [paths[position] for position in self.positions.tolist()]

    @cached_property
    def labels(self) -> list[int]:
        """The class index of each image."""
        labels: list[int] = np.repeat(np.arange(len(self.counts)), self.counts).tolist()
        return labels

    def prepare(
        self,
        folder: Path,
        report: ProgressCallback = ignore_progress,
        control: Control | None = None,
    ) -> None:
        """Make every image readable by itself, with files in `folder` if need be; they are."""

    def __len__(self) -> int:
        return len(self.positions)

    def read(self, index: int) -> bytes:
        """Return the encoded image."""
        return self.locate(index).read()

    def locate(self, index: int) -> StoredImage:
        """Return where the encoded image is, for another process to read it."""
        return FilePart(f"{self.root}/{self.paths[index]}")

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

    def find_cut_images(self, report: ProgressCallback = ignore_progress) -> list[int]:
        """Return the images whose files do not end as a JPEG or PNG does.

        Each file is looked at once; the scan remembers it.
        """
        if self.scan is None:
            paths = [f"{self.root}/{path}" for path in self.paths]
            looks = map_in_chunks(look_at_file, paths, THREADS)
            found = with_progress(looks, len(paths), report)
            return [index for index, (*_, whole) in enumerate(found) if whole != WHOLE]
        missing = self.scan.find_unknown(self.positions)
        if len(missing):
            self.scan.look_at_files(self.paths, self.positions, missing, report)
        cut: list[int] = np.flatnonzero(self.scan.facts["whole"][self.positions] != WHOLE).tolist()
        return cut

    def remember_whole(self, indices: Sequence[int]) -> None:
        """Remember that these images were decoded, and the scan with them."""
        if self.scan is not None:
            self.scan.mark_whole(self.positions[list(indices)].tolist())
            self.scan.save()

    def estimate_bytes(self) -> float:
        """Return the bytes of all images, as the scan knows them, or as a thousand tell."""
        if self.scan is not None and not len(self.scan.find_unknown(self.positions)):
            return float(self.scan.facts["size"][self.positions].sum())
        # Asking for all 1.3 million sizes of ImageNet is slow on a network file system.
        sizes = [self.size(index) for index in range(0, len(self), max(1, len(self) // 1000))]
        return len(self) * sum(sizes) / len(sizes)

    def estimate_unpacked_bytes(self) -> float:
        """Return the bytes that `prepare` writes."""
        return 0.0

    def find_changed_since_scan(self, sizes: np.ndarray, mtimes_ns: np.ndarray) -> list[str]:
        """Return the images that had another size or time when they were scanned."""
        if self.scan is None:
            return []
        facts = self.scan.facts[self.positions]
        other = (facts["size"] != sizes) | (facts["mtime_ns"] != mtimes_ns)
        return [self.name(i) for i in np.flatnonzero(other & (facts["whole"] != UNKNOWN)).tolist()]

    def has_only_text_names(self) -> bool:
        """Return whether the names of all images and classes are UTF-8."""
        if self.scan is not None and self.by_folder:
            return self.scan.has_only_text_names()
        # Python keeps the bytes of other names as lone surrogates. All names in one go: one by one,
        # those of ImageNet take a second.
        return is_encodable("\n".join((*self.classes, *self.paths)))

    def check_same_files(self) -> None:
        """Raise SourceError if images were added or removed since the folders were listed."""
        if self.scan is not None:
            self.scan.check_same_files()

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
        sizes = map_in_chunks(self.size, range(len(self)), THREADS)
        return self.fingerprint_of(sizes)

    def fingerprint_of(self, sizes: Iterable[int]) -> str:
        """Return the fingerprint if the files have these sizes."""
        # Not of the content, which would mean reading the whole data set each time.
        digest = hashlib.sha256()
        for name, size in zip(self.paths, sizes, strict=True):
            digest.update(f"{name}\0{size}\n".encode())
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
