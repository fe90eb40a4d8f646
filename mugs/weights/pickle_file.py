"""Read `.pth` files of others: tensors, plain values and NumPy numbers, and nothing that runs."""

import argparse
import pickle
import re
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import torch

from pipeline.files import open_regular_file

# What a download leaves instead of weights, by how the file begins.
NO_WEIGHTS = {
    rb"\s*<(!doctype|html|\?xml)": "a web page, not weights: the download was refused or needs"
    " a confirmation; fetch the file again",
    rb"version https://git-lfs": "a Git LFS pointer, not weights;"
    " fetch the file with `git lfs pull`",
}
# A zip file, a pickle of protocol 2 or later, or a tar file: all that torch ever wrote.
TORCH_BEGINNINGS = (b"PK\x03\x04", b"\x80")
# NumPy's names of numbers. A scalar of another kind could hold Python objects.
SCALAR_TYPES = ("b1", "i1", "i2", "i4", "i8", "u1", "u2", "u4", "u8", "f2", "f4", "f8")


class WeightsError(ValueError):
    """Weights cannot be used; the message names the file or the keys.

    `details` holds what is too long for one line: all keys.
    """

    def __init__(self, message: str, details: str = "") -> None:
        super().__init__(message)
        self.details = details


def read_released_checkpoint(path: Path) -> dict[str, Any]:
    """Return the content of a `.pth` file, full or backbone only.

    A pickle can run code, so tensors, plain values, NumPy numbers (a scheduled learning rate in an
    optimizer's state) and the old argument namespace are read, and everything else is refused.

    Raises:
        WeightsError: the file is missing, damaged, no file of PyTorch, or unsafe.
    """
    check_torch_file(path)
    check_members(path)
    try:
        with torch.serialization.safe_globals(list_safe_globals()):
            content = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        raise WeightsError(
            f"{path}: refused, because reading it could run code: it holds {name_refused(error)}"
            " beside tensors and plain values; save the state dict alone, where the file is from"
        ) from error
    except Exception as error:
        # Damaged pickles raise whatever it is: KeyError, IndexError, struct.error and more.
        raise WeightsError(f"{path}: damaged or not a PyTorch file: {error}") from error
    if not isinstance(content, dict):
        raise WeightsError(f"{path}: holds a {type(content).__name__}, not a dictionary of weights")
    return content


def check_torch_file(path: Path) -> None:
    """Raise WeightsError if the first bytes tell that torch did not write the file."""
    try:
        with open(open_regular_file(path), "rb") as stream:
            head = stream.read(512)
    except OSError as error:
        raise WeightsError(f"{path}: {error.strerror}") from error
    for pattern, what in NO_WEIGHTS.items():
        if re.match(pattern, head, re.IGNORECASE):
            raise WeightsError(f"{path}: is {what}")
    is_tar = head[257:262] == b"ustar"
    if not head.startswith(TORCH_BEGINNINGS) and not is_tar:
        raise WeightsError(f"{path}: is not a PyTorch file, it begins with {head[:16]!r}")


def check_members(path: Path) -> None:
    """Check that a zip file of torch holds no more than it has bytes, before it is unpacked.

    torch stores tensors as they are. A compressed file of a megabyte could fill the memory.

    Raises:
        WeightsError: a member is compressed, or the members are larger than the file.
    """
    if not zipfile.is_zipfile(path):
        return
    try:
        with zipfile.ZipFile(path) as archive:
            members = archive.infolist()
    except (OSError, ValueError, zipfile.BadZipFile) as error:
        raise WeightsError(f"{path}: damaged or not a PyTorch file: {error}") from error
    for member in members:
        if member.compress_type != zipfile.ZIP_STORED:
            raise WeightsError(
                f"{path}: holds {member.filename!r} compressed, so PyTorch did not write it;"
                " it is not unpacked"
            )
    total = sum(member.file_size for member in members)
    if total > path.stat().st_size:
        raise WeightsError(f"{path}: says that it holds {total} bytes, which is more than it has")


def name_refused(error: pickle.UnpicklingError) -> str:
    """Return what a file holds that is not allowed, from torch's error of many lines."""
    # "Unsupported global: GLOBAL module.Name was not an allowed global by default", or
    # "Trying to load unsupported GLOBAL module.Name whose module ..."
    found = re.search(r"GLOBAL (\S+)", str(error))
    if found:
        return f"`{found.group(1)}`"
    reason = re.search(r"Unsupported [^\n]{,200}", str(error))
    return f"something else ({reason.group() if reason else 'torch does not say what'})"


class NumberType:
    """Stands for `numpy.dtype` in a pickle: a type of numbers, and none of NumPy's others."""

    def __init__(self, name: str, *_: Any) -> None:
        if name not in SCALAR_TYPES:
            raise pickle.UnpicklingError(f"GLOBAL numpy.dtype({name!r})")
        self.name = name

    def __setstate__(self, state: tuple[Any, ...]) -> None:
        """Take the byte order ("<", ">" or "|") from the state that NumPy writes."""
        self.name = str(state[1]) + self.name[-2:]


def read_number(kind: NumberType, data: bytes) -> Any:
    """Return a NumPy scalar as a plain number; stands for NumPy's function of the pickle."""
    return np.frombuffer(data, kind.name, count=1)[0].item()


def list_safe_globals() -> list[Any]:
    """Return what a file may name, in the form that torch takes.

    The release keeps learning rates as NumPy scalars, whose function NumPy 1 and 2 name
    differently. Both names lead to our reader: NumPy's would take objects as well.
    """
    return [
        argparse.Namespace,
        NumberType,
        (NumberType, "numpy.dtype"),
        (read_number, "numpy.core.multiarray.scalar"),
        (read_number, "numpy._core.multiarray.scalar"),
    ]
