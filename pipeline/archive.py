"""Zip files of one form: the same members give the same bytes, and only that form is read.

A member is stored as it is, never compressed: what a compressor makes depends on its version, and a
file of some kB could become one of many GB. Names are sorted, dates and modes are fixed, and there
is nothing between, before or behind the members. So the bytes around the members follow from their
names, sizes and checksums. The reader works them out and compares: what other programs disagree
about (overlapping members, two names for one, sizes that differ between the two headers, text
behind the end) is a difference, and no case of its own. The module `zipfile` reads all of it.

https://pkware.cachefly.net/webdocs/casestudies/APPNOTE.TXT, sections 4.3.7, 4.3.12 and 4.3.16
"""

import re
import stat
import struct
import unicodedata
import zlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import BinaryIO

from pipeline.files import open_regular_file, replace_atomically
from pipeline.text import clean_line

# Offsets and sizes have 32 bits. Larger files would need zip64, a second set of headers that
# readers disagree about.
LARGEST_ARCHIVE = (1 << 32) - 2
MOST_MEMBERS = 20_000
LONGEST_NAME = 500
CHUNK_BYTES = 1 << 20

# Version 2.0, made on Unix; the name is UTF-8; not compressed; 1980-01-01, the first day there is.
_VERSION = 20
_MADE_BY = 3 << 8 | _VERSION
_UTF8 = 1 << 11
_STORED = 0
_TIME = 0
_DATE = 1 << 5 | 1
# A regular file that everybody may read.
_MODE = (stat.S_IFREG | 0o644) << 16
_ENCRYPTED = 1
_TAKES_ZIP64 = 0xFFFFFFFF

_LOCAL = struct.Struct("<4s5H3L2H")
_CENTRAL = struct.Struct("<4s6H3L5H2L")
_END = struct.Struct("<4s4H2LH")
# No part begins with a dot, so none is `..` or hidden; there is no backslash and no colon.
_NAME = re.compile(r"\w[\w.-]*(/\w[\w.-]*)*")


class ArchiveError(ValueError):
    """A file is no archive of our form; the message names the file and the member."""


@dataclass(frozen=True)
class Member:
    """A file in an archive: its name, its size and its CRC-32."""

    name: str
    size: int
    crc: int
    # Where its header begins.
    offset: int = 0

    @property
    def data_offset(self) -> int:
        """Where its bytes begin."""
        return self.offset + _LOCAL.size + len(self.name.encode())

    @property
    def local_header(self) -> bytes:
        """What stands before its bytes."""
        name = self.name.encode()
        fields = (_VERSION, _UTF8, _STORED, _TIME, _DATE, self.crc, self.size, self.size)
        return _LOCAL.pack(b"PK\3\4", *fields, len(name), 0) + name

    @property
    def central_header(self) -> bytes:
        """What stands about it at the end of the archive."""
        name = self.name.encode()
        fields = (_MADE_BY, _VERSION, _UTF8, _STORED, _TIME, _DATE, self.crc, self.size, self.size)
        places = (len(name), 0, 0, 0, 0, _MODE, self.offset)
        return _CENTRAL.pack(b"PK\1\2", *fields, *places) + name


def place_members(members: Sequence[Member]) -> list[Member]:
    """Return members in their order in the file, each with its offset."""
    placed = []
    offset = 0
    for member in sorted(members, key=lambda member: member.name):
        placed.append(Member(member.name, member.size, member.crc, offset))
        offset = placed[-1].data_offset + member.size
    return placed


def build_directory(members: Sequence[Member]) -> bytes:
    """Return what stands behind the last of the placed members."""
    start = members[-1].data_offset + members[-1].size if members else 0
    headers = b"".join(member.central_header for member in members)
    count = len(members)
    return headers + _END.pack(b"PK\5\6", 0, 0, count, count, len(headers), start, 0)


def write_archive(path: Path, contents: Mapping[str, bytes | Path]) -> None:
    """Write an archive of members that are given as bytes or as files.

    Raises:
        ArchiveError: a name has no place in an archive, or there are too many or too large members.
    """
    members = [_measure(path, name, content) for name, content in contents.items()]
    _check_names(path, [member.name for member in members])
    placed = place_members(members)
    directory = build_directory(placed)
    size = len(directory) + sum(len(member.local_header) + member.size for member in placed)
    if size > LARGEST_ARCHIVE or len(placed) > MOST_MEMBERS:
        raise ArchiveError(
            f"{path}: {len(placed)} files of {size / 2**30:.1f} GiB in all; a bundle has at most"
            f" {MOST_MEMBERS} and less than 4 GiB"
        )
    with replace_atomically(path) as temporary, temporary.open("wb") as stream:
        for member in placed:
            stream.write(member.local_header)
            written = 0
            for chunk in _iter_chunks(contents[member.name]):
                stream.write(chunk)
                written += len(chunk)
            if written != member.size:
                raise ArchiveError(f"{path}: {member.name} changed while it was read")
        stream.write(directory)


def _measure(path: Path, name: str, content: bytes | Path) -> Member:
    size = crc = 0
    for chunk in _iter_chunks(content):
        size += len(chunk)
        crc = zlib.crc32(chunk, crc)
    if size > LARGEST_ARCHIVE:
        raise ArchiveError(f"{path}: {name} has 4 GiB or more, which a bundle cannot hold")
    return Member(name, size, crc)


def _iter_chunks(content: bytes | Path) -> Iterator[bytes]:
    if isinstance(content, bytes):
        yield content
        return
    with open(open_regular_file(content), "rb") as stream:
        while chunk := stream.read(CHUNK_BYTES):
            yield chunk


def _check_names(path: Path, names: Sequence[str]) -> None:
    """Raise ArchiveError if a name could lead out of a folder, or if two are one on some system."""
    known: set[str] = set()
    for name in names:
        shown = f"{path}: member {clean_line(name)[:100]!r}"
        if not _NAME.fullmatch(name) or len(name.encode()) > LONGEST_NAME:
            raise ArchiveError(
                f"{shown}: not a name of a bundle: letters, digits, _, - and dots, in folders"
                " below it"
            )
        # Some file systems take upper and lower case, or both ways to write é, for the same.
        plain = unicodedata.normalize("NFC", name).casefold()
        if plain in known:
            raise ArchiveError(f"{shown}: is there twice")
        known.add(plain)


@dataclass
class Archive:
    """An archive that was opened; its form was checked, the content of its members was not."""

    path: Path
    stream: BinaryIO
    members: dict[str, Member] = field(default_factory=dict)

    def __enter__(self) -> "Archive":
        """Return itself."""
        return self

    def __exit__(self, *error: object) -> None:
        """Close the file."""
        self.stream.close()

    def iter_chunks(self, name: str) -> Iterator[bytes]:
        """Yield the bytes of a member.

        Raises:
            ArchiveError: its CRC-32 is another one.
        """
        member = self.members[name]
        self.stream.seek(member.data_offset)
        left = member.size
        crc = 0
        while left:
            chunk = self.stream.read(min(left, CHUNK_BYTES))
            if not chunk:
                raise ArchiveError(f"{self.path}: {name} is cut short")
            left -= len(chunk)
            crc = zlib.crc32(chunk, crc)
            yield chunk
        if crc != member.crc:
            raise ArchiveError(f"{self.path}: {name} differs from its CRC-32")

    def read(self, name: str, limit: int) -> bytes:
        """Return a member.

        Raises:
            ArchiveError: there is none, it has more bytes than `limit`, or another CRC-32.
        """
        if name not in self.members:
            raise ArchiveError(f"{self.path}: {name} is missing")
        if self.members[name].size > limit:
            raise ArchiveError(f"{self.path}: {name} has more than {limit} bytes")
        return b"".join(self.iter_chunks(name))


def open_archive(path: Path) -> Archive:
    """Return an archive whose form is the one that `write_archive` gives it.

    Raises:
        ArchiveError: it is not; the message names the first member that differs, and how.
        OSError: the file cannot be read.
    """
    stream = open(open_regular_file(path), "rb")  # noqa: SIM115
    try:
        return Archive(path, stream, _read_members(path, stream))
    except BaseException:
        stream.close()
        raise


def _read_members(path: Path, stream: BinaryIO) -> dict[str, Member]:
    directory = _read_directory(path, stream)
    found = list(_parse_directory(path, directory))
    _check_names(path, [member.name for member in found])
    if [member.name for member in found] != sorted(member.name for member in found):
        raise ArchiveError(f"{path}: its members are not sorted by name")
    placed = place_members(found)
    for member, expected in zip(found, placed, strict=True):
        shown = f"{path}: member {member.name!r}"
        if member.offset != expected.offset:
            raise ArchiveError(f"{shown}: does not begin where the one before it ends")
        stream.seek(expected.offset)
        header = stream.read(len(expected.local_header))
        if header != expected.local_header:
            raise ArchiveError(f"{shown}: its two headers differ")
    start = placed[-1].data_offset + placed[-1].size if placed else 0
    if start + len(directory) != stream.seek(0, 2):
        raise ArchiveError(f"{path}: there are bytes between its members and their list")
    if directory != build_directory(placed):
        raise ArchiveError(f"{path}: the list of its members is not as bundle writes it")
    return {member.name: member for member in placed}


def _read_directory(path: Path, stream: BinaryIO) -> bytes:
    """Return the list of members and the record behind it, which are the end of the file."""
    size = stream.seek(0, 2)
    if size > LARGEST_ARCHIVE:
        raise ArchiveError(f"{path}: has 4 GiB or more, which no bundle has")
    stream.seek(max(0, size - _END.size))
    end = stream.read()
    if len(end) != _END.size or not end.startswith(b"PK\5\6"):
        raise ArchiveError(
            f"{path}: does not end as a bundle does: it is cut short, no zip file, or something was"
            " appended"
        )
    _, _, _, _, count, length, start, _ = _END.unpack(end)
    if _TAKES_ZIP64 in (length, start) or count == 0xFFFF:
        raise ArchiveError(f"{path}: is a zip64 file, which no bundle is")
    # Before anything of them is read: each takes memory.
    longest = MOST_MEMBERS * (_CENTRAL.size + LONGEST_NAME)
    if count > MOST_MEMBERS or length > longest:
        raise ArchiveError(f"{path}: says that it has {count} members in {length} bytes")
    if start + length + _END.size != size:
        raise ArchiveError(f"{path}: the list of its members is not where it says")
    stream.seek(start)
    return stream.read(length) + end


def _parse_directory(path: Path, directory: bytes) -> Iterator[Member]:
    """Yield the members of a list; their headers are compared later.

    Raises:
        ArchiveError: one is of a kind that a bundle has not, or the list ends elsewhere.
    """
    place = 0
    end = len(directory) - _END.size
    while place < end:
        if place + _CENTRAL.size > end:
            raise ArchiveError(f"{path}: the list of its members is cut short")
        fields = _CENTRAL.unpack_from(directory, place)
        first = place + _CENTRAL.size
        raw = directory[first : first + fields[10]]
        name = raw.decode("utf-8", errors="replace")
        _check_kind(f"{path}: member {clean_line(name)[:100]!r}", fields)
        if name.encode() != raw:
            raise ArchiveError(f"{path}: member {clean_line(name)[:100]!r}: its name is no text")
        yield Member(name, fields[9], fields[7], fields[16])
        place = first + fields[10]
    if place != end:
        raise ArchiveError(f"{path}: the list of its members does not end where it says")


def _check_kind(shown: str, fields: Sequence[int]) -> None:
    """Raise ArchiveError if a member is of a kind that a bundle has not."""
    _, _, _, flags, method, _, _, _, packed, size, _, extra, comment, _, _, mode, offset = fields
    kinds = {
        "is encrypted": flags & _ENCRYPTED,
        "is compressed": method != _STORED or packed != size,
        "is a zip64 member": _TAKES_ZIP64 in (size, packed, offset),
        "has extra fields": extra,
        "has a comment": comment,
        "is a link, a folder or a device": mode != _MODE,
    }
    for kind, given in kinds.items():
        if given:
            raise ArchiveError(f"{shown}: {kind}, which no bundle has")
