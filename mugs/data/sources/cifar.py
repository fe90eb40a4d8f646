"""CIFAR-10 and CIFAR-100 as published for Python: pickled arrays, but no code of theirs is run."""

import hashlib
import io
import math
import pickle
import pickletools
import zlib
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from mugs.data.prefetch import ProgressCallback, ignore_progress
from mugs.data.sources.base import FileStamp, ImageInMemory, SourceError, StoredImage
from mugs.data.sources.listing import ListedSource
from pipeline.files import read_bounded

SIDE = 32
# The largest published file has 155 MB. A pickle of a few bytes could ask for any memory.
MAX_BYTES = 1 << 30
MAX_MEMO = 1 << 20


def encode_latin1(text: str, encoding: str) -> bytes:
    """Return the bytes that Python 3 wrote into an old pickle as text."""
    if encoding != "latin1":
        raise pickle.UnpicklingError(f"asks for the encoding {encoding!r}")
    return text.encode("latin1")


class ByteType:
    """Stands for `numpy.dtype` in a pickle: whole numbers of one byte, and none of NumPy's others.

    An array of another type, such as of objects, would take its bytes for addresses.
    """

    def __init__(self, name: Any, *_: Any) -> None:
        if name not in ("u1", "|u1"):
            raise pickle.UnpicklingError(f"holds an array of {name!r}, expected bytes ('u1')")

    def __setstate__(self, state: Any) -> None:
        """Ignore the byte order; a byte has none."""


class ArrayType:
    """Stands for `numpy.ndarray` in a pickle, which only names it."""


class ByteArray:
    """Stands for an array while a pickle is read: it keeps shape and bytes, and checks them."""

    def __init__(self, *_: Any) -> None:
        self.array: np.ndarray | None = None

    def __setstate__(self, state: Any) -> None:
        """Take what NumPy writes: version, shape, type, whether columns come first, bytes."""
        try:
            _, shape, kind, columns_first, data = state
            content = data.encode("latin1") if isinstance(data, str) else bytes(data)
            sizes = tuple(int(size) for size in shape)
        except (TypeError, ValueError, UnicodeEncodeError) as error:
            raise pickle.UnpicklingError(f"holds an array that is none ({error})") from error
        if not isinstance(kind, ByteType) or columns_first or len(content) != math.prod(sizes):
            raise pickle.UnpicklingError("holds an array with a wrong type or number of bytes")
        self.array = np.frombuffer(content, np.uint8).reshape(sizes)


# A pickle can name any function to be called. These are the only names an array needs, in NumPy 1
# and 2; nothing of NumPy is called, since its functions believe what a pickle says.
ALLOWED: dict[tuple[str, str], Any] = {
    ("_codecs", "encode"): encode_latin1,
    ("numpy.core.multiarray", "_reconstruct"): ByteArray,
    ("numpy._core.multiarray", "_reconstruct"): ByteArray,
    ("numpy", "ndarray"): ArrayType,
    ("numpy", "dtype"): ByteType,
}


class ArrayUnpickler(pickle.Unpickler):
    """Reads plain values and NumPy arrays, and refuses to look up anything else."""

    def find_class(self, module: str, name: str) -> Any:
        """Return one of the allowed objects."""
        if (module, name) not in ALLOWED:
            raise pickle.UnpicklingError(
                f"asks for {module}.{name}, which no published CIFAR file does"
            )
        return ALLOWED[module, name]


class ArraySource(ListedSource):
    """Pixels (N, 32, 32, 3) with labels, handed out as JPEG, or as PNG after `use_png`.

    JPEG of quality 100 without chroma subsampling changes pixels by up to 4 levels, PNG none.
    """

    format = "JPEG"

    def __init__(
        self, root: Path, split: str, pixels: np.ndarray, labels: list[int], classes: list[str]
    ) -> None:
        paths = [f"{split}/{index:05d}.jpg" for index in range(len(labels))]
        super().__init__(root, paths, labels, classes)
        self.pixels = pixels

    def read(self, index: int) -> bytes:
        """Return the encoded image."""
        buffer = io.BytesIO()
        options = {"quality": 100, "subsampling": 0} if self.format == "JPEG" else {}
        Image.fromarray(self.pixels[index]).save(buffer, format=self.format, **options)
        return buffer.getvalue()

    def locate(self, index: int) -> StoredImage:
        """Return the encoded image itself."""
        return ImageInMemory(self.read(index))

    def use_png(self) -> None:
        """Hand out PNG from now on."""
        self.format = "PNG"
        self.paths = [path.replace(".jpg", ".png") for path in self.paths]

    def read_with_stamp(self, index: int) -> tuple[bytes, FileStamp]:
        """Return the encoded image; it has no file of its own."""
        return self.read(index), self.stamp(index)

    def stamp(self, index: int) -> FileStamp:
        """Return the checksum of the pixels in place of a time."""
        return FileStamp(0, zlib.crc32(self.pixels[index].tobytes()))

    def size(self, index: int) -> int:
        """Return the size of the encoded image in bytes."""
        return len(self.read(index))

    def find_cut_images(self, report: ProgressCallback = ignore_progress) -> list[int]:
        """Return none: all rows were read."""
        return []

    @property
    def fingerprint(self) -> str:
        """Hash of pixels, labels and classes."""
        return self.fingerprint_of(())

    def fingerprint_of(self, sizes: Iterable[int]) -> str:
        """Return the hash of pixels, labels and classes, whatever size the encoded images have."""
        digest = hashlib.sha256(self.pixels.tobytes())
        digest.update(repr((self.labels, self.classes)).encode())
        return digest.hexdigest()


def find_cifar_dir(root: Path, folder: str, mark: str) -> Path:
    """Return the folder that holds the file `mark`: `root` itself or the published folder in it."""
    for candidate in (root, root / folder):
        if (candidate / mark).is_file():
            return candidate
    raise SourceError(
        f"{root}: neither {mark} nor {folder}/{mark} in it; expected the unpacked public download"
    )


def open_cifar(
    root: Path,
    split: str,
    *,
    folder: str,
    files: Mapping[str, Sequence[str]],
    labels: str,
    classes: tuple[str, str],
) -> ArraySource:
    """Open `root` or `root/folder`. Raises SourceError naming a wrong file.

    `files` are those of each split, in order; `labels` is the key of the labels; `classes` are file
    and key of the class names.
    """
    root = find_cifar_dir(root, folder, classes[0])
    known = [str(name) for name in read_dictionary(root / classes[0], classes[1])[classes[1]]]
    pixels = []
    numbers = []
    for name in files[split]:
        content = read_dictionary(root / name, "data", labels)
        rows = content["data"].array if isinstance(content["data"], ByteArray) else None
        chosen = content[labels]
        if not isinstance(chosen, list) or not all(type(label) is int for label in chosen):
            raise SourceError(f"{root / name}: expected a list of whole numbers under {labels!r}")
        shape = (len(chosen), 3 * SIDE * SIDE)
        if rows is None or rows.shape != shape:
            raise SourceError(
                f"{root / name}: expected {shape[0]} rows of {shape[1]} bytes under 'data'"
            )
        wrong = sorted({str(label) for label in chosen if not 0 <= int(label) < len(known)})
        if wrong:
            raise SourceError(
                f"{root / name}: labels {', '.join(wrong[:5])}, expected 0 to {len(known) - 1}"
            )
        # A row holds 1,024 bytes of red, then as many of green and of blue.
        pixels.append(rows.reshape(-1, 3, SIDE, SIDE).transpose(0, 2, 3, 1))
        numbers += [int(label) for label in chosen]
    return ArraySource(root, split, np.ascontiguousarray(np.concatenate(pixels)), numbers, known)


def check_memo(data: bytes) -> None:
    """Raise UnpicklingError for a pickle that numbers its objects so high that memory runs out."""
    for opcode, argument, _ in pickletools.genops(data):
        if "PUT" in opcode.name and isinstance(argument, int) and argument > MAX_MEMO:
            raise pickle.UnpicklingError(f"numbers an object {argument}")


def read_dictionary(path: Path, *keys: str) -> dict[str, Any]:
    """Return a pickled dictionary that has the keys. Raises SourceError naming the file."""
    try:
        data = read_bounded(path, MAX_BYTES)
        check_memo(data)
        # Text of Python 2 becomes str.
        content = ArrayUnpickler(io.BytesIO(data), encoding="latin1").load()
    except FileNotFoundError as error:
        raise SourceError(f"{path}: no such file") from error
    except (
        pickle.UnpicklingError,
        EOFError,
        OSError,
        ValueError,
        TypeError,
        AttributeError,
        LookupError,
        ArithmeticError,
        MemoryError,
        RecursionError,
    ) as error:
        # Damaged pickles raise all of these.
        raise SourceError(f"{path}: not a CIFAR file ({error or 'cut short'})") from error
    missing = [key for key in keys if not isinstance(content, dict) or key not in content]
    if missing:
        raise SourceError(f"{path}: not a CIFAR file (no {', '.join(map(repr, missing))} in it)")
    return dict(content)
