"""Images inside other files, as they are downloaded: tar files, WebDataset shards, parquet files.

    ILSVRC2012_img_train.tar     a tar of tars, one for each class; or a folder of these
    ILSVRC2012_img_val.tar       images without folders; a file of labels has their classes
    any.tar                      class/image.jpg
    shard-000000.tar ...         WebDataset: key.jpg beside key.cls, which holds the label
    x-00000-of-00294.parquet ... as the Hub has it

They give the source that the same images give in class folders: the same paths, in the same order.
So the converted file, its fingerprint and the run are the same. Where each image lies is found in
one pass over the files and remembered, as the scan of a folder is.
"""

import hashlib
import io
import json
import logging
import os
import weakref
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from mugs.data.prefetch import ProgressCallback, ignore_progress, map_in_chunks, with_progress
from mugs.data.sources.base import (
    FileStamp,
    ImageInMemory,
    SourceError,
    find_repeated,
    open_image,
    raise_if_any,
)
from mugs.data.sources.folder import FolderSource
from mugs.data.sources.packed_images import FoundImage, list_images
from mugs.data.sources.packed_labels import name_classes, read_classes
from mugs.data.sources.parquet import read_row, unpack_parquet
from mugs.data.sources.scan import (
    CUT,
    FILE_ENDS,
    SMALLEST_HUGE_FILE,
    THREADS,
    UNKNOWN,
    UNREADABLE,
    WHOLE,
    to_array,
)
from pipeline.control import Control
from pipeline.files import open_regular_file, replace_atomically

logger = logging.getLogger(__name__)
FORMAT = 1
# Of more files, each is opened for every image.
MAX_OPEN = 256
SUFFIXES = (".tar", ".parquet")
PLACE = np.dtype(
    [
        ("label", "<i4"),
        ("file", "<i4"),
        ("row", "<i8"),
        ("offset", "<i8"),
        ("size", "<i8"),
        ("whole", "<i1"),
    ]
)
Stamps = list[list[Any]]
"""Path, size, time and inode of each file that was read."""


@dataclass
class PackedIndex:
    """Where the images are: a PLACE for each of `paths`, which are `class/file`."""

    classes: list[str]
    paths: list[str]
    places: np.ndarray
    skipped: Mapping[str, int] = field(default_factory=dict)


class PackedSource(FolderSource):
    """The images in some files, in the order that they have in class folders."""

    def __init__(
        self,
        root: Path,
        files: Sequence[Path],
        index: PackedIndex,
        stamps: Stamps,
        remember: Callable[[PackedIndex], None],
    ) -> None:
        self.root = root
        self.files = list(files)
        self.index = index
        self.stamps = stamps
        self.remember = remember
        self.classes = index.classes
        self.paths = index.paths
        self.labels = index.places["label"].tolist()
        self.skipped = index.skipped
        self.scan = None
        self.positions = np.arange(len(index.paths))
        self.is_parquet = self.files[0].suffix == ".parquet"
        # The files in which images lie one after another; for parquet `prepare` writes them.
        self.plain = [] if self.is_parquet else self.files
        self._open: dict[int, int] = {}
        weakref.finalize(self, _close_all, self._open)

    def prepare(
        self,
        folder: Path,
        report: ProgressCallback = ignore_progress,
        control: Control | None = None,
    ) -> None:
        """Make every image readable by itself: those of parquet files are written below `folder`.

        A start that was killed is gone on with, file by file.
        """
        if not self.is_parquet:
            return
        sizes = np.bincount(
            self.index.places["file"], self.index.places["size"], minlength=len(self.files)
        ).astype(np.int64)
        # With the time of each file: what an earlier start wrote of another one does not count.
        plain = [folder / f"{number:05d}_{self.stamps[number][2]}" for number in range(len(sizes))]
        for number, (file, target) in enumerate(zip(self.files, plain, strict=True)):
            unpack_parquet(file, target, int(sizes[number]))
            report(int(sizes[: number + 1].sum()), int(sizes.sum()))
            if control is not None:
                control.heartbeat(0)
                if control.stop_requested():
                    control.interrupted(0)
        self.plain = plain

    def read(self, index: int) -> bytes:
        """Return the encoded image."""
        place = self.index.places[index]
        if not self.plain:
            return read_row(self.files[place["file"]], int(place["row"]))
        return self._read_part(index, 0, int(place["size"]))

    def locate(self, index: int) -> ImageInMemory:
        """Return the encoded image itself."""
        return ImageInMemory(self.read(index))

    def _read_part(self, index: int, start: int, size: int) -> bytes:
        place = self.index.places[index]
        number = int(place["file"])
        descriptor = self._open.get(number)
        if descriptor is None:
            descriptor = open_regular_file(self.plain[number])
        try:
            data = os.pread(descriptor, size, int(place["offset"]) + start)
        finally:
            # A process may have a thousand open files, and another thread may have been faster.
            keep = len(self.plain) <= MAX_OPEN
            if not keep or self._open.setdefault(number, descriptor) != descriptor:
                os.close(descriptor)
        if len(data) != size:
            raise OSError(f"{self.describe(index)}: {len(data)} of {size} bytes")
        return data

    def read_with_stamp(self, index: int) -> tuple[bytes, FileStamp]:
        """Return the encoded image and its stamp."""
        return self.read(index), self.stamp(index)

    def stamp(self, index: int) -> FileStamp:
        """Return the size of the image, and the time of the file that it is in."""
        place = self.index.places[index]
        return FileStamp(int(place["size"]), int(self.stamps[place["file"]][2]))

    def find_cut_images(self, report: ProgressCallback = ignore_progress) -> list[int]:
        """Return the images that do not end as a JPEG or PNG does; each is looked at once."""
        whole = self.index.places["whole"]
        missing = np.flatnonzero(whole == UNKNOWN)
        if len(missing):
            looks = map_in_chunks(self._look, missing.tolist(), THREADS)
            found = with_progress(looks, len(missing), report)
            whole[missing] = np.fromiter(found, dtype=np.int8, count=len(missing))
            self.remember(self.index)
        cut: list[int] = np.flatnonzero(whole != WHOLE).tolist()
        return cut

    def _look(self, index: int) -> int:
        size = int(self.index.places["size"][index])
        start = max(0, size - 8)
        last = self._read_part(index, start, size - start)
        return WHOLE if looks_whole(size, last, lambda: self.read(index)) else CUT

    def remember_whole(self, indices: Sequence[int]) -> None:
        """Remember that these images were decoded."""
        if indices:
            self.index.places["whole"][list(indices)] = WHOLE
            self.remember(self.index)

    def estimate_bytes(self) -> float:
        """Return the bytes of all images."""
        return float(self.index.places["size"].sum())

    def estimate_unpacked_bytes(self) -> float:
        """Return the bytes that `prepare` writes."""
        return self.estimate_bytes() if self.is_parquet else 0.0

    def check_same_files(self) -> None:
        """Raise SourceError if one of the files is another one than when it was listed."""
        changed = [stamp[0] for stamp in self.stamps if stamp_file(Path(stamp[0])) != stamp]
        raise_if_any(self.root, "files changed meanwhile; start again", changed)

    def describe(self, index: int) -> str:
        """Return where a sample lies, for messages."""
        return f"{self.files[self.index.places['file'][index]]}: {self.paths[index]}"


def _close_all(descriptors: Mapping[int, int]) -> None:
    for descriptor in descriptors.values():
        os.close(descriptor)


def is_packed(path: Path) -> bool:
    """Return whether a path names files that hold images, or a folder of such files."""
    if set(path.name) & set("*?["):
        return True
    if path.is_dir():
        entries = list(os.scandir(path))
        return any(entry.name.endswith(SUFFIXES) for entry in entries) and not any(
            entry.is_dir() for entry in entries if not entry.name.startswith(".")
        )
    return path.suffix in SUFFIXES


def open_packed(
    path: Path,
    labels: Path | None,
    memory: Path | None,
    report: ProgressCallback = ignore_progress,
) -> PackedSource:
    """Return the images in the file `path`, in all files of that folder, or of that pattern.

    `labels` has the classes of images without class folders. What the folder `memory` remembers is
    reused. Raises SourceError naming what is wrong.
    """
    files = find_files(path)
    read = [*files, *([labels] if labels else [])]
    stamps = [stamp_file(file) for file in read]
    place = None
    if memory is not None:
        name = hashlib.sha256(json.dumps([file for file, *_ in stamps]).encode()).hexdigest()[:16]
        place = memory / f"packed-{name}.npz"

    def remember(index: PackedIndex) -> None:
        if place is not None:
            write_index(place, index, stamps)

    index = read_index(place, stamps)
    if index is None:
        logger.info("%s: listing the images in %d files", path, len(files))
        index = build_index(path, files, labels, report)
        remember(index)
    return PackedSource(path, files, index, stamps, remember)


def find_files(path: Path) -> list[Path]:
    """Return the files, sorted. Raises SourceError if there are none, or of several kinds."""
    if set(path.name) & set("*?["):
        found = sorted(path.parent.glob(path.name))
    else:
        found = sorted(path.iterdir()) if path.is_dir() else [path]
    files = [file for file in found if file.suffix in SUFFIXES and not file.name.startswith(".")]
    kinds = {file.suffix for file in files}
    missing = [str(file) for file in files if not file.is_file()]
    raise_if_any(path, "are no files", missing)
    if len(kinds) != 1:
        raise SourceError(
            f"{path}: expected .tar or .parquet files, found {sorted(kinds) or 'none'}"
        )
    return files


def stamp_file(path: Path) -> list[Any]:
    """Return path, size, time and inode of a file."""
    try:
        found = path.stat()
    except OSError as error:
        raise SourceError(f"{path}: {error.strerror}") from error
    return [str(path.absolute()), found.st_size, found.st_mtime_ns, found.st_ino]


def build_index(
    path: Path,
    files: Sequence[Path],
    labels: Path | None,
    report: ProgressCallback = ignore_progress,
) -> PackedIndex:
    """Return where the images in some files are. Raises SourceError naming what is wrong."""
    images, skipped = list_images(path, files, report)
    if not images:
        raise SourceError(f"{path}: no images in it")
    classes, paths, numbers = find_classes(path, images, labels)
    raise_if_any(path, "images are there again, by class and name", find_repeated(paths))
    order = sorted(range(len(paths)), key=lambda i: (numbers[i], *_split_path(paths[i])))
    places = np.zeros(len(images), PLACE)
    for position, number in enumerate(order):
        image = images[number]
        whole = UNKNOWN
        if image.data_end is not None:
            whole = WHOLE if looks_whole(image.size, image.data_end, lambda: b"") else CUT
        places[position] = (
            numbers[number],
            image.file,
            image.row,
            image.offset,
            image.size,
            whole,
        )
    return PackedIndex(classes, [paths[number] for number in order], places, skipped)


def _split_path(path: str) -> tuple[str, str]:
    # As folders are listed: the images of a folder before those below it.
    folder, _, name = path.rpartition("/")
    return folder, name


def find_classes(
    path: Path, images: Sequence[FoundImage], labels: Path | None
) -> tuple[list[str], list[str], list[int]]:
    """Return the classes, and the path `class/file` and label of each image."""
    names = [image.name for image in images]
    numbers = [image.label for image in images if image.label is not None]
    if numbers and labels is not None:
        raise SourceError(
            f"{path}: its images have labels, so there is nothing to take {labels} for"
        )
    if numbers:
        try:
            classes, paths = name_classes(names, numbers)
        except SourceError as error:
            raise SourceError(f"{path}: {error}") from error
        return classes, paths, numbers
    if labels is not None:
        names = [name.rpartition("/")[2] for name in names]
        paths = [
            f"{label}/{name}"
            for label, name in zip(read_classes(labels, names), names, strict=True)
        ]
    else:
        paths = names
        alone = [name for name in names if "/" not in name]
        raise_if_any(
            path,
            "images have neither a class folder nor a label (set train_labels or val_labels)",
            alone,
        )
    classes = sorted({name.partition("/")[0] for name in paths})
    number = {name: index for index, name in enumerate(classes)}
    return classes, paths, [number[name.partition("/")[0]] for name in paths]


def looks_whole(size: int, last: bytes, read: Callable[[], bytes]) -> bool:
    """Return whether an image ends as a JPEG or PNG does, and is no larger than Pillow reads."""
    ending = next((end for end in FILE_ENDS if last.endswith(end)), None)
    if ending is None or size < SMALLEST_HUGE_FILE[ending]:
        return ending is not None
    try:
        with open_image(io.BytesIO(read())):
            return True
    except (OSError, ValueError, SyntaxError):
        return False


def write_index(place: Path, index: PackedIndex, stamps: Stamps) -> None:
    """Remember an index; a folder that cannot be written is none of the caller's problems."""
    facts = {
        "format": FORMAT,
        "stamps": stamps,
        "classes": index.classes,
        "skipped": dict(index.skipped),
    }
    paths = os.fsencode("".join(f"{path}\0" for path in index.paths))
    try:
        with replace_atomically(place) as temporary, temporary.open("wb") as stream:
            np.savez(
                stream,
                facts=to_array(json.dumps(facts).encode()),
                paths=to_array(paths),
                places=index.places,
            )
    except OSError as error:
        logger.info("%s: what is in the files is not remembered (%s)", place, error)


def read_index(place: Path | None, stamps: Stamps) -> PackedIndex | None:
    """Return the remembered index of files with these stamps, or None."""
    if place is None or not place.is_file():
        return None
    try:
        with np.load(place, allow_pickle=False) as content:
            facts = json.loads(content["facts"].tobytes())
            if facts["format"] != FORMAT or facts["stamps"] != stamps:
                return None
            paths = os.fsdecode(content["paths"].tobytes()).split("\0")[:-1]
            places = content["places"]
        if places.dtype != PLACE or len(places) != len(paths):
            raise ValueError("its parts do not fit together")
        return PackedIndex(list(facts["classes"]), paths, places, dict(facts["skipped"]))
    except UNREADABLE as error:
        logger.warning("%s: not readable (%s), the files are listed again", place, error)
        return None
