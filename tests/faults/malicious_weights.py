"""Files of weights made to do harm: pickles that call something,
and safetensors headers that lie.
"""

import json
import os
import pickle
import zipfile
from collections.abc import Callable
from copy import copy
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from malice import Case, Place

from mugs.checkpoint import record
from mugs.checkpoint.save_load import load_latest
from mugs.models.vit import build_vit
from mugs.weights.backbone_file import load_backbone, read_backbone_file, write_backbone_file
from mugs.weights.pickle_file import read_released_checkpoint
from pipeline.files import hash_file


class Bomb:
    """Pickles as a call."""

    def __init__(self, function: Callable[..., Any], *arguments: Any) -> None:
        self.call = (function, arguments)

    def __reduce__(self) -> tuple[Callable[..., Any], tuple[Any, ...]]:
        return self.call


def legacy(content: object, path: Path) -> None:
    """Write the format that torch had before zip files."""
    torch.save(content, path, _use_new_zipfile_serialization=False)


def raw(content: object, path: Path) -> None:
    """A plain pickle."""
    path.write_bytes(pickle.dumps(content))


def late(content: object, path: Path) -> None:
    """A zip file whose pickle is appended a second time, as a bomb."""
    torch.save({"x": torch.ones(1)}, path)
    with zipfile.ZipFile(path, "a") as archive:
        first = archive.namelist()[0].split("/")[0]
        archive.writestr(f"{first}/data.pkl", pickle.dumps(content, protocol=2))


def loaded(
    content: Callable[[Any], object], name: str, write: Callable[[object, Path], None], read: Any
) -> Case:
    """Content that holds a bomb, written to a file of this name and then read."""

    def case(place: Place) -> Callable[[], object]:
        write(content(str(place.fuse)), place.root / name)
        return lambda: read(place.root / name)

    return case


CALLS: dict[str, Callable[[str], Bomb]] = {
    "os.system": lambda fuse: Bomb(os.system, f"touch {fuse}"),
    "eval": lambda fuse: Bomb(eval, f"open({fuse!r}, 'w')"),
    "exec": lambda fuse: Bomb(exec, f"open({fuse!r}, 'w')"),
    "open": lambda fuse: Bomb(open, fuse, "w"),
    "nested": lambda fuse: Bomb(dict, [("x", Bomb(os.mkdir, fuse))]),
    "getattr": lambda fuse: Bomb(getattr, Bomb(__import__, "os"), "system"),
}
FORMS = {"zip": torch.save, "legacy": legacy, "raw": raw, "late": late}
# Pickles that call something when loaded carelessly.
BOMBS: dict[str, Case] = {
    f"{kind}, {name}, {form}": loaded(
        lambda fuse, make=make, around=around: around(make(fuse)), file, write, read
    )
    for name, make in CALLS.items()
    for form, write in FORMS.items()
    for kind, around, file, read in (
        (
            "pickle",
            lambda bomb: {"teacher": {"x": torch.ones(2)}, "epoch": bomb},
            "weights.pth",
            read_released_checkpoint,
        ),
        (
            "pickle as safetensors",
            lambda bomb: {"x": bomb},
            "weights.safetensors",
            read_backbone_file,
        ),
    )
}


def tensor_file(header: bytes, length: int | None = None, data: bytes = b"\0" * 8) -> bytes:
    """A safetensors file with this header, and this length of it written in front."""
    return (len(header) if length is None else length).to_bytes(8, "little") + header + data


def one(**facts: Any) -> bytes:
    """A header of one tensor."""
    return json.dumps(
        {"x": {"dtype": "F32", "shape": [2], "data_offsets": [0, 8], **facts}}
    ).encode()


HEADERS = {
    "length of the header 2**63": tensor_file(one(), 2**63),
    "length of the header beyond the file": tensor_file(one(), 1 << 20),
    "length of the header 99 MB": tensor_file(one(), 99_000_000),
    "no header": b"",
    "shape that overflows": tensor_file(one(shape=[2**40, 2**40])),
    "shape of terabytes": tensor_file(one(shape=[2**40])),
    "offsets of terabytes": tensor_file(one(shape=[2**40], data_offsets=[0, 2**42])),
    "offsets backwards": tensor_file(one(data_offsets=[8, 0])),
    "negative shape": tensor_file(one(shape=[-2])),
    "unknown dtype": tensor_file(one(dtype="PICKLE")),
    "nested deeply": tensor_file(b"[" * 1_000_000),
    "no JSON": tensor_file(b"\xff\xfe" * 100),
    "overlap": tensor_file(
        json.dumps(
            {n: {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]} for n in "ab"}
        ).encode()
    ),
}


def weights(content: bytes) -> Case:
    """A file of weights with this content."""
    return loaded(
        lambda fuse: content,
        "weights.safetensors",
        lambda data, path: path.write_bytes(data),
        read_backbone_file,
    )


def checkpoint(content: bytes) -> Case:
    """A checkpoint with this content, and a record that agrees with it."""

    def case(place: Place) -> Callable[[], object]:
        folder = place.folder / "checkpoints" / "step_00000003"
        folder.mkdir(parents=True)
        (folder / "x.safetensors").write_bytes(content)
        stored = record.StoredFile(len(content), hash_file(folder / "x.safetensors"))
        record.write_record(folder, record.CheckpointRecord(3, {}, {"x.safetensors": stored}))
        return lambda: load_latest(folder.parent)

    return case


def write_lying_weights(path: Path, **lies: Any) -> None:
    """Write the weights of a small ViT, whose description has these values changed."""
    vit = build_vit("vit_mini")
    meta = {"arch": asdict(vit.config) | lies}
    write_backbone_file(path, dict(vit.state_dict()), meta)


def described(**lies: Any) -> Case:
    """Weights that say another shape than they have."""

    def case(place: Place) -> Callable[[], object]:
        write_lying_weights(place.root / "weights.safetensors", **lies)
        return lambda: load_backbone(place.root / "weights.safetensors")

    return case


def zipped(change: Callable[[Path], None]) -> Case:
    """A file of torch whose zip archive was changed."""

    def case(place: Place) -> Callable[[], object]:
        path = place.root / "weights.pth"
        torch.save({"x": torch.zeros(1 << 20)}, path)
        change(path)
        return lambda: read_released_checkpoint(path)

    return case


def deflate(path: Path) -> None:
    """Write the archive compressed."""
    with zipfile.ZipFile(path) as archive:
        members = {name: archive.read(name) for name in archive.namelist()}
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, content in members.items():
            archive.writestr(name, content)
    assert path.stat().st_size < 10_000


def repeat_member(path: Path) -> None:
    """List a member of the archive a second time, under another name."""
    with zipfile.ZipFile(path, "a") as archive:
        archive.writestr("archive/more", "")
        largest = max(archive.infolist(), key=lambda member: member.file_size)
        twice = copy(largest)
        twice.filename = "archive/twice"
        archive.filelist.append(twice)


def write_raw_bytes(content: object, path: Path) -> None:
    """Write bytes as they are."""
    assert isinstance(content, bytes)
    path.write_bytes(content)


NESTED_NOTE = json.dumps({"__metadata__": {"mugs": "[" * 100_000}}).encode()
# What asks for far more than the file holds, and what would be waited for.
GREEDY: dict[str, Case] = {
    "depth of a million": described(depth=1_000_000),
    "embed_dim of a million": described(embed_dim=3_000_000),
    "image of a million pixels": described(image_size=8_000_000),
    "patches of no pixels": described(patch_size=0),
    "no heads": described(num_heads=0),
    "heads that do not divide": described(num_heads=5),
    "depth is a text": described(depth="3"),
    "depth is true": described(depth=True),
    "unknown positions": described(positions="planted"),
    "description nested deeply": weights(tensor_file(NESTED_NOTE, data=b"")),
    "header of 20 MB": weights(tensor_file(b"{}" + b" " * (20 << 20), data=b"")),
    "tensors of a terabyte": lambda place: huge(place, 1 << 40),
    "pickle that asks for what it never kept": loaded(
        lambda fuse: b"\x80\x02h\x7f.", "weights.pth", write_raw_bytes, read_released_checkpoint
    ),
    "archive that is compressed": zipped(deflate),
    "archive that lists a member twice": zipped(repeat_member),
    "archive that is a pipe": lambda place: waiting(place, "weights.pth", read_released_checkpoint),
    "tensors that are a pipe": lambda place: waiting(
        place, "weights.safetensors", read_backbone_file
    ),
}


def huge(place: Place, size: int) -> Callable[[], object]:
    """A file of one tensor of so many bytes, which takes no room."""
    path = place.root / "weights.safetensors"
    header = json.dumps(
        {
            "__metadata__": {"mugs": "{}"},
            "x": {"dtype": "U8", "shape": [size], "data_offsets": [0, size]},
        }
    ).encode()
    path.write_bytes(tensor_file(header, data=b""))
    os.truncate(path, 8 + len(header) + size)
    return lambda: read_backbone_file(path)


def waiting(place: Place, name: str, read: Callable[[Path], object]) -> Callable[[], object]:
    """A pipe that nobody writes to."""
    os.mkfifo(place.root / name)
    return lambda: read(place.root / name)


# Weights and checkpoints whose safetensors header lies.
LIES: dict[str, Case] = {
    **{f"weights, {name}": weights(content) for name, content in HEADERS.items()},
    **{f"checkpoint, {name}": checkpoint(content) for name, content in HEADERS.items()},
    **{f"weights, {name}": case for name, case in GREEDY.items()},
}
