"""Tensors as safetensors files, written here and read by the library.

The own writer hashes, syncs and reports disk errors. A file is the length of the header (8 bytes,
little endian), the header (JSON: name -> dtype, shape, first and last byte), then the tensors
without gaps. https://github.com/huggingface/safetensors#format
"""

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from mugs.checkpoint.record import CheckpointError, StoredFile
from pipeline.files import open_regular_file, write_new_file

CHUNK_BYTES = 16 << 20
# A tensor takes about 100 bytes of a header: 80,000 of them, far more than any network has.
LONGEST_HEADER = 8 << 20
DTYPE_NAMES = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.int16: "I16",
    torch.int8: "I8",
    torch.uint8: "U8",
    torch.bool: "BOOL",
}


def write_tensors(
    path: Path, tensors: Mapping[str, Tensor], note: Mapping[str, str] | None = None
) -> StoredFile:
    """Write a new file and flush it to the disk; `note` goes into its header.

    Raises:
        OSError: the disk failed.
        TypeError: the format has no name for a dtype.
    """
    # Largest items first, so that each tensor starts at a multiple of its item size.
    order = sorted(tensors, key=lambda name: (-tensors[name].itemsize, name))
    table: dict[str, Any] = {"__metadata__": dict(note)} if note else {}
    first = 0
    for name in order:
        tensor = tensors[name]
        if tensor.dtype not in DTYPE_NAMES:
            raise TypeError(
                f"{path}: {name} is {tensor.dtype}; "
                f"expected one of {', '.join(map(str, DTYPE_NAMES))}"
            )
        end = first + tensor.nbytes
        table[name] = {
            "dtype": DTYPE_NAMES[tensor.dtype],
            "shape": list(tensor.shape),
            "data_offsets": [first, end],
        }
        first = end
    header = json.dumps(table, separators=(",", ":")).encode()
    # Spaces after the JSON keep the tensors aligned to 8 bytes; the format allows them.
    header += b" " * (-len(header) % 8)
    head = len(header).to_bytes(8, "little") + header

    def chunks() -> Iterator[bytes | memoryview]:
        yield head
        for name in order:
            # Flat first: a tensor without dimensions cannot be viewed as bytes.
            data = (
                tensors[name].detach().cpu().contiguous().flatten().view(torch.uint8).numpy().data
            )
            # In chunks, without a second copy of the tensor: they are hashed and written one by
            # one.
            for start in range(0, len(data), CHUNK_BYTES):
                yield data[start : start + CHUNK_BYTES]

    return StoredFile(len(head) + first, write_new_file(path, chunks()))


def read_tensors(path: Path) -> dict[str, Tensor]:
    """Return the tensors of a file; raise CheckpointError with its name if it is damaged."""
    try:
        check_header_length(path)
        return load_file(path)
    except (OSError, SafetensorError) as error:
        raise CheckpointError(f"{path}: {error}") from error


def check_header_length(path: Path) -> None:
    """Check that a file's header is short, before the library builds what it says.

    Raises:
        OSError: there is no such file, or it is a pipe or a device.
        SafetensorError: the header is far longer than that of any network.
    """
    with open(open_regular_file(path), "rb") as stream:
        length = int.from_bytes(stream.read(8), "little")
    if length > LONGEST_HEADER:
        raise SafetensorError(
            f"says that its header has {length} bytes, more than {LONGEST_HEADER}"
        )
