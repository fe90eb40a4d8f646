"""Where the files of a tar file lie in it; a tar of tars counts as one folder for each of them.

Only headers are read, so a file of 138 GB takes seconds to minutes. What a hostile or damaged file
could use is refused: links, devices, names that lead elsewhere, and a missing end.
"""

import os
import tarfile
from collections.abc import Iterator
from functools import lru_cache
from pathlib import Path, PurePosixPath
from typing import BinaryIO, NamedTuple

from mugs.data.sources.base import SourceError, is_name_below
from mugs.data.sources.scan import is_machine_made
from pipeline.files import open_regular_file

BLOCK = 512
CUT = "it was cut short, or is damaged there; fetch it again"


# Of a header in the plain format: a regular file whose name needs no further header or field.
PLAIN_TYPE = b"0"
NAME = slice(0, 100)
SIZE = slice(124, 136)
CHECKSUM = slice(148, 156)
TYPE = slice(156, 157)
PREFIX = slice(345, 346)
SPACES = 8 * ord(" ")


class Member(NamedTuple):
    """A file: its path, and where its bytes are."""

    name: str
    offset: int
    size: int


class Header(NamedTuple):
    """What a header tells: a name, where header and bytes are, and if it is a file or folder."""

    name: str
    start: int
    data: int
    size: int
    is_file: bool = True
    is_folder: bool = False


def list_tar(path: Path) -> Iterator[Member]:
    """Yield the files of a tar file in their order, those of inner tar files instead of these.

    Raises SourceError, naming file and member, if anything is wrong with it.
    """
    try:
        with open(open_regular_file(path), "rb") as stream:
            yield from _list_members(path, stream, "", 0, os.fstat(stream.fileno()).st_size)
    except (tarfile.TarError, OSError, EOFError, ValueError) as error:
        if isinstance(error, SourceError):
            raise
        raise SourceError(
            f"{path}: not a readable tar file ({error}); unpack a compressed one (gunzip) first"
        ) from error


def _list_members(
    path: Path, stream: BinaryIO, folder: str, start: int, end: int
) -> Iterator[Member]:
    """Yield the files of a tar file that lies from `start` to `end` in `stream`."""
    where = f"{path}: {folder}" if folder else f"{path}: "
    stream.seek(start)
    # "r:" takes no compressed file, in which nothing can be found without reading all before it.
    with tarfile.open(fileobj=stream, mode="r:") as tar:
        for header in _read_headers(tar, stream.fileno()):
            name = _check_name(where, header.name)
            stop = header.data + header.size
            if header.start >= end or stop > end:
                raise SourceError(f"{where}{name}: reaches beyond the end of the file: {CUT}")
            if header.is_folder or _is_machine_made(name.rpartition("/")[0]):
                continue
            if not header.is_file:
                raise SourceError(f"{where}{name}: is a link, a device or a sparse file")
            if not name.lower().endswith(".tar"):
                yield Member(f"{folder}{name}", header.data, header.size)
            elif folder:
                raise SourceError(f"{where}{name}: a tar file in a tar file in a tar file")
            else:
                inner = f"{PurePosixPath(name).stem}/"
                yield from _list_members(path, stream, inner, header.data, stop)
        # `next` also ends at a header that is damaged or missing.
        stream.seek(tar.offset)
        if tar.offset + BLOCK > end or stream.read(BLOCK) != bytes(BLOCK):
            raise SourceError(f"{where}no end mark at byte {tar.offset:,}: {CUT}")


def _read_headers(tar: tarfile.TarFile, descriptor: int) -> Iterator[Header]:
    """Yield the headers of a tar file; those in the plain format are read ten times as fast."""
    # `tarfile` has read the first one when it opened the file.
    plain = None
    while True:
        if plain is not None:
            tar.offset = plain.data + -(-plain.size // BLOCK) * BLOCK
            yield plain
        else:
            member = tar.next()
            if member is None:
                return
            # It would keep all million of them.
            tar.members.clear()  # type: ignore[attr-defined]
            is_file = member.isreg() and not member.issparse()
            yield Header(
                member.name, member.offset, member.offset_data, member.size, is_file, member.isdir()
            )
        # Names and sizes of all files may be set for the whole archive.
        plain = None if tar.pax_headers else _read_plain(descriptor, tar.offset)


def _read_plain(descriptor: int, start: int) -> Header | None:
    """Return the header at `start` if it is in the plain format; None for what `tarfile` reads."""
    block = os.pread(descriptor, BLOCK, start)
    if block[TYPE] != PLAIN_TYPE or block[PREFIX] != b"\0":
        return None
    size, checksum = block[SIZE].strip(b" \0"), block[CHECKSUM].strip(b" \0")
    if not (size.isdigit() and checksum.isdigit()):
        return None
    try:
        # Its own field counts as spaces.
        if int(checksum, 8) != sum(block) - sum(block[CHECKSUM]) + SPACES:
            return None
        name = os.fsdecode(block[NAME].partition(b"\0")[0])
        return Header(name, start, start + BLOCK, int(size, 8))
    except ValueError:
        return None


def _check_name(where: str, name: str) -> str:
    """Return the path of a member, without `./`."""
    name = name.removeprefix("./")
    folder, _, last = name.rpartition("/")
    if last in ("", ".", "..") or name.startswith("/") or "\0" in last:
        folder, last = name, ""
    place = _find_place(folder)
    if place is None:
        raise SourceError(f"{where}{name}: this name leads out of the folder")
    return f"{place}/{last}" if place and last else place or last


# Looked at once for all images of a class.
@lru_cache(maxsize=64)
def _find_place(folder: str) -> str | None:
    """Return the path of a folder, "" for the one around all; None if it leads out of that."""
    if not is_name_below(folder):
        return None
    place = PurePosixPath(folder).as_posix()
    return "" if place == "." else place


@lru_cache(maxsize=64)
def _is_machine_made(folder: str) -> bool:
    """Return whether a folder, or one around it, was made by a program for itself."""
    return any(map(is_machine_made, PurePosixPath(folder).parts))
