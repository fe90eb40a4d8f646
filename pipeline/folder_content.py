"""What a folder of data holds, in a few facts that tell whether it holds the same today.

A data set has a million files: reading all of them at each command would take hours, and asking for
the size of each takes minutes on a network file system. So the names of all files count, the sizes
of some, and the content of those that are lists or annotations. If neither folders nor these files
were touched, which takes less than a second to see, not even the names are listed again.
"""

import hashlib
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path, PurePosixPath
from typing import Any

from pipeline.files import hash_named_files

# Of a folder with more files, only the sizes of some are looked at.
_FEW = 2000
_NUM_SAMPLED = 200
_MAX_LISTS = 50
# Of a folder with few files and no more bytes, all of the content counts.
_SMALL_BYTES = 64 << 20
_LIST_SUFFIXES = (".json", ".txt", ".csv", ".mat", ".xml", ".yaml")
# A conversion reads images whatever their names begin with.
_IMAGE_SUFFIXES = (".jpg", ".jpeg", ".png", ".ppm", ".bmp", ".pgm", ".tif", ".tiff", ".webp")


def describe_folder(root: Path) -> dict[str, Any]:
    """Return the facts; links are followed. Of hidden files and folders, only images count.

    Raises:
        OSError: the folder cannot be read.
    """
    names = sorted(_list_files(root))
    sample = names if len(names) <= _FEW else _choose_sample(names)
    lists = [name for name in sample if _is_list(name)][:_MAX_LISTS]
    sizes = {name: _stat(root / name).st_size for name in sample}
    small = len(names) <= _FEW and sum(sizes.values()) <= _SMALL_BYTES
    return {
        "files": len(names),
        "names": _hash_lines(names),
        "sizes": _hash_lines(f"{name} {size}" for name, size in sizes.items()),
        "content": _hash_all(root, names) if small else None,
        "lists": hash_named_files(root, map(Path, lists)),
        "touched": _hash_times(root, sample),
        # The names are kept only where listing all of them again takes long.
        "sample": sample if len(names) > _FEW else None,
    }


def compare_folder(root: Path, before: Mapping[str, Any]) -> str:
    """Return how the folder differs from facts of before; "" if it holds the same.

    Raises:
        OSError: the folder cannot be read.
    """
    sample = before.get("sample")
    if not root.is_dir():
        raise NotADirectoryError(str(root))
    try:
        chosen = sorted(_list_files(root)) if sample is None else list(map(str, sample))
        if _hash_times(root, chosen) == before.get("touched"):
            return ""
    except FileNotFoundError:
        pass  # one of the sample is gone
    now = describe_folder(root)
    if now["files"] != before.get("files"):
        return f"{now['files']:,} files instead of {before.get('files'):,}"
    for fact, words in (
        ("names", "files of other names"),
        ("sizes", "files of other sizes"),
        ("lists", "lists or annotations of another content"),
        ("content", "files of another content"),
    ):
        # Of larger folders, and in older records, the content is not known.
        if now[fact] != before.get(fact) and None not in (now[fact], before.get(fact)):
            return words
    # A copy, or files that were written again as they were.
    return ""


def _list_files(root: Path) -> Iterator[str]:
    """Yield the paths of all files below `root`, relative to it."""
    waiting = [""]
    seen: set[tuple[int, int]] = set()
    while waiting:
        folder = waiting.pop()
        found = _stat(root / folder)
        # Links may lead in a circle.
        if (found.st_dev, found.st_ino) in seen:
            continue
        seen.add((found.st_dev, found.st_ino))
        with os.scandir(root / folder) as entries:
            for entry in entries:
                # @eaDir holds the thumbnails of Synology disk stations.
                hidden = entry.name.startswith(".")
                path = f"{folder}/{entry.name}" if folder else entry.name
                if entry.is_dir():
                    if not hidden and entry.name != "@eaDir":
                        waiting.append(path)
                elif not hidden or _is_hidden_image(entry.name):
                    yield path


def _choose_sample(names: Sequence[str]) -> list[str]:
    """Return names that are spread evenly, and those of lists and annotations."""
    spread = {names[place * len(names) // _NUM_SAMPLED] for place in range(_NUM_SAMPLED)}
    lists = [name for name in names if _is_list(name)]
    return sorted(spread.union(lists[:_MAX_LISTS]))


def _is_hidden_image(name: str) -> bool:
    # macOS keeps what other file systems cannot hold of x.jpg in ._x.jpg.
    return not name.startswith("._") and PurePosixPath(name).suffix.lower() in _IMAGE_SUFFIXES


def _hash_all(root: Path, names: Sequence[str]) -> str | None:
    """Return a hash of all files; None if one cannot be read, which whoever needs it tells."""
    try:
        return hash_named_files(root, map(Path, names))
    except OSError:
        return None


def _is_list(name: str) -> bool:
    return PurePosixPath(name).suffix.lower() in _LIST_SUFFIXES


def _hash_times(root: Path, sample: Iterable[str]) -> str:
    """Return a hash of when the folders at the top and the sampled files were changed.

    The time of a folder is that of the last file that was added, removed or renamed in it.
    """
    with os.scandir(root) as entries:
        folders = sorted(entry.name for entry in entries if entry.is_dir())
    lines = [f"{name} {_stat(root / name).st_mtime_ns}" for name in ("", *folders)]
    for name in sample:
        found = _stat(root / name)
        lines.append(f"{name} {found.st_size} {found.st_mtime_ns}")
    return _hash_lines(lines)


def _stat(path: Path) -> os.stat_result:
    try:
        return path.stat()
    except FileNotFoundError:
        # A link that leads nowhere is told where the data set is read.
        return path.lstat()


def _hash_lines(lines: Iterable[str]) -> str:
    digest = hashlib.sha256()
    for line in lines:
        # Names that are not UTF-8 count too.
        digest.update(f"{line}\n".encode(errors="surrogateescape"))
    return digest.hexdigest()
