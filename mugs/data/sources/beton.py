"""The `.beton` file: FFCV's layout (version 2), with unchanged JPEG bytes, read without FFCV.

    header | field descriptors | metadata | pages of 8 MiB with the images | allocation table

The header is written last: a file that was cut short has version 0, which every reader refuses. A
sidecar JSON, written after the file, holds names, classes, checksums and the fingerprint of the
source. A file without a sidecar is not used.
"""

import dataclasses
import json
import mmap
import os
import weakref
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import BinaryIO, Literal

import numpy as np

from mugs.data.sources.base import FilePart, SourceError
from pipeline.files import read_bounded, replace_atomically

# FFCV's layout, field by field; `align` gives the padding of its C structures. An image may not
# cross a page, so PAGE is also the size of the largest image.
PAGE = 8 * 1024 * 1024
VERSION = 2
SIDECAR_FORMAT = 1
HEADER = np.dtype(
    [
        ("version", "<u2"),
        ("num_fields", "<u2"),
        ("page_size", "<u4"),
        ("num_samples", "<u8"),
        ("alloc_table_ptr", "<u8"),
    ],
    align=True,
)
FIELD = np.dtype(
    [("type_id", "<u1"), ("name", ("<u1", 16)), ("arguments", ("<u1", (1024,)))], align=True
)
IMAGE = np.dtype([("mode", "<u1"), ("width", "<u2"), ("height", "<u2"), ("data_ptr", "<u8")])
SAMPLE = np.dtype([("image", IMAGE), ("label", "<i8")], align=True)
ALLOCATION = np.dtype([("sample_id", "<u8"), ("ptr", "<u8"), ("size", "<u8")])
# A sidecar has about 60 bytes for each image.
SIDECAR_LIMIT = 1 << 30
_JSON_ELEMENTS = 1 << 12  # of a list, at a time
# FFCV's numbers of its field types.
IMAGE_TYPE = 2
INT_TYPE = 1
Storage = Literal["jpeg", "original"]
"""As RGB or gray JPEG, anything else encoded anew, or all as they are."""


@dataclass(frozen=True)
class Sidecar:
    """What the `.beton` file does not hold; `names`, `sizes` and `crc32` are in sample order.

    labels: class of each sample (-1: none) if it is not that of the folder in its name.
    changes: in how many images what is not as in the file (`mugs.data.sources.changes`).
    skipped: how many files of which kind were no images by their names.
    """

    classes: list[str]
    names: list[str]
    sizes: list[int]
    crc32: list[int]
    fingerprint: str
    file_size: int
    sha256: str
    left_out: dict[str, str] = field(default_factory=dict)
    versions: dict[str, str] = field(default_factory=dict)
    format: int = SIDECAR_FORMAT
    labels: list[int] | None = None
    changes: dict[str, int] = field(default_factory=dict)
    skipped: dict[str, int] = field(default_factory=dict)


@dataclass(frozen=True)
class EncodedImage:
    """One image as it is stored; `changes` are the bits of `mugs.data.sources.changes`."""

    data: bytes
    width: int
    height: int
    label: int
    changes: int = 0


def sidecar_path(path: Path) -> Path:
    """Return the path of the sidecar: `train.beton` -> `train.beton.json`."""
    return path.with_name(path.name + ".json")


def find_first_page(num: int) -> int:
    """Return where the images of a file with `num` of them begin."""
    return round_up_to_page(HEADER.itemsize + 2 * FIELD.itemsize + num * SAMPLE.itemsize)


def place_image(position: int, size: int) -> int:
    """Return where an image of `size` bytes goes if the file is filled up to `position`."""
    return position if position % PAGE + size <= PAGE else round_up_to_page(position)


def write_tables(stream: BinaryIO, samples: np.ndarray, sizes: np.ndarray, end: int) -> None:
    """Write all but the images, which lie where `samples` says and end at `end`; the header last.

    What was there before of an earlier try is overwritten.
    """
    num = len(samples)
    table = np.zeros(num, dtype=ALLOCATION)
    table["sample_id"] = np.arange(num)
    table["ptr"] = samples["image"]["data_ptr"]
    table["size"] = sizes
    table_at = round_up_to_page(end)
    # Beyond the end of a file this leaves zeros up to the next page.
    stream.seek(table_at)
    # Without copies: for ImageNet each would take 40 MB.
    stream.write(table.view(np.uint8).data)
    stream.truncate()
    stream.seek(0)
    stream.write(bytes(HEADER.itemsize) + _field_descriptors().tobytes())
    stream.write(samples.view(np.uint8).data)
    stream.write(bytes(find_first_page(num) - stream.tell()))
    # All else has to be on the disk before the header says that the file is complete.
    stream.flush()
    os.fsync(stream.fileno())
    stream.seek(0)
    stream.write(np.array((VERSION, 2, PAGE, num, table_at), dtype=HEADER).tobytes())
    stream.flush()
    os.fsync(stream.fileno())


def round_up_to_page(position: int) -> int:
    """Round up to a multiple of the page size."""
    return -(-position // PAGE) * PAGE


def _field_descriptors() -> np.ndarray:
    fields = np.zeros(2, dtype=FIELD)
    for entry, name, kind in zip(fields, ("image", "label"), (IMAGE_TYPE, INT_TYPE), strict=True):
        entry["type_id"] = kind
        entry["name"][: len(name)] = np.frombuffer(name.encode(), dtype=np.uint8)
    return fields


def write_sidecar(path: Path, sidecar: Sidecar) -> None:
    """Write the sidecar of the file at `path`: from now on the file counts as complete."""
    with replace_atomically(sidecar_path(path)) as temporary, temporary.open("wb") as stream:
        for text in _iter_json(sidecar):
            stream.write(text.encode())


def _iter_json(sidecar: Sidecar) -> Iterator[str]:
    """Yield the text that `json.dumps` makes of the fields, in pieces.

    Of ImageNet, the text and its bytes as a whole would take 130 MB.
    """
    opening = "{"
    for each in dataclasses.fields(sidecar):
        value = getattr(sidecar, each.name)
        yield f"{opening}{json.dumps(each.name)}: "
        opening = ", "
        if not isinstance(value, list):
            yield json.dumps(value)
            continue
        yield "["
        for start in range(0, len(value), _JSON_ELEMENTS):
            part = json.dumps(value[start : start + _JSON_ELEMENTS])[1:-1]
            yield f", {part}" if start else part
        yield "]"
    yield "}"


def read_sidecar(path: Path) -> Sidecar:
    """Return the sidecar of a `.beton` file.

    Raises SourceError if it is missing or unreadable, or the file does not have the size it states.
    """
    side = sidecar_path(path)
    if not path.is_file():
        raise SourceError(f"{path}: no such file")
    if not side.is_file():
        raise SourceError(
            f"{path}: its sidecar {side.name} is missing, so the conversion did not finish; "
            "convert again"
        )
    try:
        sidecar = Sidecar(**json.loads(read_bounded(side, SIDECAR_LIMIT)))
    except (OSError, ValueError, TypeError, RecursionError) as error:
        raise SourceError(f"{side}: not a readable sidecar ({error}); convert again") from error
    if wrong := _find_wrong_fields(sidecar):
        raise SourceError(
            f"{side}: not a readable sidecar (wrong values of {', '.join(wrong)}); convert again"
        )
    if sidecar.format != SIDECAR_FORMAT:
        raise SourceError(
            f"{side}: format {sidecar.format}, this code reads {SIDECAR_FORMAT}; convert again"
        )
    size = path.stat().st_size
    if size != sidecar.file_size:
        raise SourceError(
            f"{path}: {size} bytes, its sidecar says {sidecar.file_size}: "
            "truncated or replaced; convert again"
        )
    return sidecar


def _find_wrong_fields(sidecar: Sidecar) -> list[str]:
    """Return the names of fields whose values a conversion does not write.

    What reads an image trusts sizes and addresses, so none may be beyond what a file can have.
    """
    num = len(sidecar.names) if isinstance(sidecar.names, list) else -1
    lists = {
        "names": _holds(sidecar.names, str, num),
        "classes": _holds(sidecar.classes, str),
        "sizes": _holds(sidecar.sizes, int, num, PAGE),
        "crc32": _holds(sidecar.crc32, int, num, 0xFFFFFFFF),
        "labels": sidecar.labels is None or _holds(sidecar.labels, int, num),
        "fingerprint": isinstance(sidecar.fingerprint, str),
        "sha256": isinstance(sidecar.sha256, str),
        "file_size": type(sidecar.file_size) is int,
        **{
            name: isinstance(value, dict) and _holds(list(value.values()), kind)
            for name, value, kind in (
                ("left_out", sidecar.left_out, str),
                ("versions", sidecar.versions, str),
                ("changes", sidecar.changes, int),
                ("skipped", sidecar.skipped, int),
            )
        },
    }
    return [name for name, is_right in lists.items() if not is_right]


def _holds(values: object, kind: type, num: int | None = None, most: int | None = None) -> bool:
    """Return whether values are a list of `num` of one kind; with `most`, of 0 to `most`."""
    if not isinstance(values, list) or num not in (None, len(values)):
        return False
    # Not one by one in Python: there may be millions. `type` also tells True from 1.
    if not set(map(type, values)) <= {kind}:
        return False
    return most is None or not values or (min(values) >= 0 and max(values) <= most)


def _check_header(path: Path, mapped: mmap.mmap, sidecar: Sidecar) -> None:
    """Raise SourceError unless the header is as `write_tables` writes it: FFCV trusts it."""
    header = np.frombuffer(mapped, dtype=HEADER, count=1)[0]
    num = int(header["num_samples"])
    if header["version"] != VERSION or num != len(sidecar.names):
        raise SourceError(f"{path}: header says version {header['version']}, {num} samples")
    fields = np.frombuffer(mapped, dtype=FIELD, count=2, offset=HEADER.itemsize)
    end = int(header["alloc_table_ptr"]) + num * ALLOCATION.itemsize
    if (
        header["num_fields"] != 2
        or header["page_size"] != PAGE
        or end != sidecar.file_size
        or fields.tobytes() != _field_descriptors().tobytes()
    ):
        raise SourceError(f"{path}: its header is damaged; convert again")


class BetonSource:
    """A `.beton` file, its table memory-mapped. Raises SourceError for an incomplete file."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.sidecar = read_sidecar(path)
        self.classes = self.sidecar.classes
        self.sizes = self.sidecar.sizes
        self._file = os.open(path, os.O_RDONLY)
        weakref.finalize(self, os.close, self._file)
        num = len(self.sidecar.names)
        offset = HEADER.itemsize + 2 * FIELD.itemsize
        if self.sidecar.file_size < offset + num * SAMPLE.itemsize:
            raise SourceError(f"{path}: too short for {num} samples; convert again")
        mapped = mmap.mmap(self._file, 0, access=mmap.ACCESS_READ)
        _check_header(path, mapped, self.sidecar)
        self.samples = np.frombuffer(mapped, dtype=SAMPLE, count=num, offset=offset)
        labels = self.samples["label"]
        # -1: none. Others would be looked up in a list of the classes.
        if num and not (labels.min() >= -1 and labels.max() < max(0, len(self.classes))):
            raise SourceError(f"{path}: has labels beyond its {len(self.classes)} classes")

    def __len__(self) -> int:
        return len(self.samples)

    def read(self, index: int) -> bytes:
        """Return the encoded image."""
        part = self.locate(index)
        return os.pread(self._file, self.sizes[index], part.start)

    def locate(self, index: int) -> FilePart:
        """Return where the encoded image is, for another process to read it."""
        # The address is limited so that a damaged table gives a short read and not an error of the
        # system.
        address = min(int(self.samples["image"]["data_ptr"][index]), self.sidecar.file_size)
        return FilePart(str(self.path), address, self.sizes[index])

    def label(self, index: int) -> int:
        """Return the class index."""
        return int(self.samples["label"][index])

    def name(self, index: int) -> str:
        """Return the path in the original folder."""
        return self.sidecar.names[index]

    def describe(self, index: int) -> str:
        """Return where a sample lies, for messages."""
        return f"{self.path}: sample {index} ({self.name(index)})"

    @property
    def fingerprint(self) -> str:
        """Fingerprint of the folder that was converted."""
        return self.sidecar.fingerprint
