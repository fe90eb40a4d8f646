"""Where the files of a tar file lie in it; a tar of tars counts as one folder for each of them.

Only headers are read, so a file of 138 GB takes seconds to minutes. What a hostile or damaged file
could use is refused: links, devices, names that lead elsewhere, and a missing end.
"""

import os
import tarfile
from collections.abc import Iterator
from pathlib import Path, PurePosixPath
from typing import BinaryIO, NamedTuple

from mugs.data.sources.base import SourceError, is_name_below
from mugs.data.sources.scan import is_machine_made
from pipeline.files import open_regular_file

BLOCK = 512
CUT = "it was cut short, or is damaged there; fetch it again"


class Member(NamedTuple):
    """A file: its path, and where its bytes are."""

    name: str
    offset: int
    size: int


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
        while (member := tar.next()) is not None:
            # It would keep all million of them.
            tar.members.clear()  # type: ignore[attr-defined]
            name = _check_name(where, member)
            stop = member.offset_data + member.size
            if member.offset >= end or stop > end:
                raise SourceError(f"{where}{name}: reaches beyond the end of the file: {CUT}")
            if member.isdir() or any(map(is_machine_made, PurePosixPath(name).parts[:-1])):
                continue
            if not member.isreg() or member.issparse():
                raise SourceError(f"{where}{name}: is a link, a device or a sparse file")
            if not name.lower().endswith(".tar"):
                yield Member(f"{folder}{name}", member.offset_data, member.size)
            elif folder:
                raise SourceError(f"{where}{name}: a tar file in a tar file in a tar file")
            else:
                inner = f"{PurePosixPath(name).stem}/"
                yield from _list_members(path, stream, inner, member.offset_data, stop)
        # `next` also ends at a header that is damaged or missing.
        stream.seek(tar.offset)
        if tar.offset + BLOCK > end or stream.read(BLOCK) != bytes(BLOCK):
            raise SourceError(f"{where}no end mark at byte {tar.offset:,}: {CUT}")


def _check_name(where: str, member: tarfile.TarInfo) -> str:
    """Return the path of a member, without `./`."""
    name = member.name.removeprefix("./")
    if not is_name_below(name):
        raise SourceError(f"{where}{member.name}: this name leads out of the folder")
    return PurePosixPath(name).as_posix()
