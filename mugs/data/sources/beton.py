"""The `.beton` file: FFCV's layout (version 2), written with verbatim JPEG bytes and read without FFCV.

    header | field descriptors | metadata | pages of 8 MiB with the images | allocation table
The header is written last, so a file that was cut short has version 0, which every reader refuses. A sidecar JSON,
written after the file, holds names, classes, checksums and the fingerprint of the source; a file without is not used.
"""

import json
import mmap
import os
import weakref
import zlib
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field
from pathlib import Path

import numpy as np

from mugs.data.sources.base import SourceError
from pipeline.files import replace_atomically, write_atomic

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
IMAGE_TYPE, INT_TYPE = 2, 1


@dataclass(frozen=True)
class Sidecar:
    """What the `.beton` file does not hold itself. `names`, `sizes` and `crc32` are in sample order.

    labels: class of each sample (-1: none) where it is not that of the folder in its name.
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


@dataclass(frozen=True)
class EncodedImage:
    """One image as it is stored."""

    data: bytes
    width: int
    height: int
    label: int


def sidecar_path(path: Path) -> Path:
    """`train.beton` -> `train.beton.json`."""
    return path.with_name(path.name + ".json")


def write_beton(
    path: Path, images: Iterable[EncodedImage], num: int
) -> tuple[list[int], list[int]]:
    """Write `num` images; returns sizes and CRC-32s. The file appears under its name only when it is complete."""
    samples, table = np.zeros(num, dtype=SAMPLE), np.zeros(num, dtype=ALLOCATION)
    crcs = []
    start = HEADER.itemsize + 2 * FIELD.itemsize + samples.nbytes
    position = -(-start // PAGE) * PAGE
    with replace_atomically(path) as temporary, temporary.open("wb") as stream:
        stream.write(bytes(HEADER.itemsize))
        for index, image in enumerate(images):
            size = len(image.data)
            if position % PAGE + size > PAGE:
                position = -(-position // PAGE) * PAGE
            stream.seek(position)
            stream.write(image.data)
            samples[index] = ((0, image.width, image.height, position), image.label)
            table[index] = (index, position, size)
            crcs.append(zlib.crc32(image.data))
            position += size
        position = -(-position // PAGE) * PAGE
        stream.seek(position)
        stream.write(table.tobytes())
        stream.seek(HEADER.itemsize)
        stream.write(_fields().tobytes() + samples.tobytes())
        stream.flush()
        os.fsync(stream.fileno())
        header = np.zeros((), dtype=HEADER)
        header["version"], header["num_fields"], header["page_size"] = VERSION, 2, PAGE
        header["num_samples"], header["alloc_table_ptr"] = num, position
        stream.seek(0)
        stream.write(header.tobytes())
    return table["size"].tolist(), crcs


def _fields() -> np.ndarray:
    fields = np.zeros(2, dtype=FIELD)
    for entry, (name, kind) in zip(
        fields, (("image", IMAGE_TYPE), ("label", INT_TYPE)), strict=True
    ):
        entry["type_id"] = kind
        entry["name"][: len(name)] = np.frombuffer(name.encode(), dtype=np.uint8)
    return fields


def write_sidecar(path: Path, sidecar: Sidecar) -> None:
    """Write the sidecar of the file at `path`: from now on it counts as complete."""
    write_atomic(sidecar_path(path), json.dumps(asdict(sidecar)))


def read_sidecar(path: Path) -> Sidecar:
    """The sidecar of a `.beton` file. Raises SourceError when it is missing, unreadable or of another size."""
    side = sidecar_path(path)
    if not path.is_file():
        raise SourceError(f"{path}: no such file")
    if not side.is_file():
        raise SourceError(
            f"{path}: its sidecar {side.name} is missing, so the conversion did not finish; convert again"
        )
    try:
        sidecar = Sidecar(**json.loads(side.read_text(encoding="utf-8")))
    except (ValueError, TypeError) as error:
        raise SourceError(f"{side}: not a readable sidecar ({error}); convert again") from error
    if sidecar.format != SIDECAR_FORMAT:
        raise SourceError(
            f"{side}: format {sidecar.format}, this code reads {SIDECAR_FORMAT}; convert again"
        )
    size = path.stat().st_size
    if size != sidecar.file_size:
        raise SourceError(
            f"{path}: {size} bytes, its sidecar says {sidecar.file_size}: truncated or replaced; convert again"
        )
    return sidecar


class BetonSource:
    """A `.beton` file, its table memory-mapped. Raises SourceError for a file that is not complete."""

    def __init__(self, path: Path) -> None:
        self.path, self.sidecar = path, read_sidecar(path)
        self.classes = self.sidecar.classes
        self._file = os.open(path, os.O_RDONLY)
        weakref.finalize(self, os.close, self._file)
        mapped = mmap.mmap(self._file, 0, access=mmap.ACCESS_READ)
        header = np.frombuffer(mapped, dtype=HEADER, count=1)[0]
        if header["version"] != VERSION or header["num_samples"] != len(self.sidecar.names):
            raise SourceError(
                f"{path}: header says version {header['version']}, {header['num_samples']} samples"
            )
        offset = HEADER.itemsize + 2 * FIELD.itemsize
        self.samples = np.frombuffer(
            mapped, dtype=SAMPLE, count=int(header["num_samples"]), offset=offset
        )
        self.sizes = self.sidecar.sizes

    def __len__(self) -> int:
        return len(self.samples)

    def read(self, index: int) -> bytes:
        """Encoded image bytes, by a system call: a page fault in a map would stop all threads, or kill the process."""
        address = min(int(self.samples["image"]["data_ptr"][index]), self.sidecar.file_size)
        return os.pread(self._file, self.sizes[index], address)

    def label(self, index: int) -> int:
        """Class index."""
        return int(self.samples["label"][index])

    def name(self, index: int) -> str:
        """Path in the original folder."""
        return self.sidecar.names[index]

    def describe(self, index: int) -> str:
        """Where a sample lies, for messages."""
        return f"{self.path}: sample {index} ({self.name(index)})"

    @property
    def fingerprint(self) -> str:
        """Fingerprint of the folder that was converted."""
        return self.sidecar.fingerprint
