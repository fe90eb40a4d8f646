"""One look at the files of an image folder, remembered for the commands and jobs that come later.

A scan holds the images of every folder with their sizes, times, and whether each ends as an image
does. A later one is checked against the disk: a folder whose time differs is listed again and its
images are looked at again; of the others, a thousand files are compared by size and time. A file
that was overwritten in place may so stay unnoticed until it is converted, where every file is read.
"""

import hashlib
import json
import logging
import os
import time
import zipfile
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path

import numpy as np
from PIL import Image

from mugs.data.prefetch import ProgressCallback, map_in_chunks, with_progress
from mugs.data.sources.base import (
    SourceError,
    count_skipped,
    describe_skipped,
    format_names,
    is_image_name,
    open_image,
)
from pipeline.files import cache_folder, open_regular_file, replace_atomically

logger = logging.getLogger(__name__)
FORMAT = 1
# The last bytes of a JPEG file (end of image) and of a PNG file (name and checksum of its last
# chunk).
FILE_ENDS = (b"\xff\xd9", b"IEND\xaeB`\x82")
# Pillow refuses images of more than 179 million pixels. A JPEG file has at least a bit for each
# block of 64 of them, which makes 350 kB; a PNG file is at most 1,032 times smaller than its
# pixels, of a bit at least, which makes 22 kB. Smaller files need no look at their header.
SMALLEST_HUGE_FILE = {FILE_ENDS[0]: 300_000, FILE_ENDS[1]: 20_000}
# Threads wait for a network file system most of the time, so there are more of them than cores.
THREADS = 16
# A folder that changed right before it was listed may change again within the same tick of the
# clock of its file system, and then has the same time.
SETTLED_NS = 5 * 10**9
# Files whose size and time are compared with a remembered scan.
SAMPLES = 1000

# Of each image: whether it ends as an image does, or was decoded.
UNKNOWN = -1
CUT = 0
WHOLE = 1
FACT = np.dtype([("size", "<i8"), ("mtime_ns", "<i8"), ("whole", "<i1")])
NO_FACT = np.array((0, 0, UNKNOWN), dtype=FACT)
# What Python raises for a scan that was damaged.
UNREADABLE = (OSError, ValueError, KeyError, TypeError, EOFError, zipfile.BadZipFile)


@dataclass(frozen=True)
class Listing:
    """The images that lie in one folder, sorted.

    names: their file names, each with a zero byte after it.
    mtime_ns: time of the folder; 0 if it may change again without another time.
    below: names of the folders in it that may hold images; those that programs made are `skipped`.
    others: how many files of which kind are no images by their names.
    """

    names: bytes
    mtime_ns: int
    below: tuple[str, ...] = ()
    skipped: tuple[str, ...] = ()
    others: Mapping[str, int] = field(default_factory=dict)

    def split(self) -> list[str]:
        """Return the names."""
        return os.fsdecode(self.names).split("\0")[:-1]

    def pick(self, index: int) -> str:
        """Return one name, without making texts of the others."""
        return os.fsdecode(self.names.split(b"\0", index + 1)[index])

    @cached_property
    def count(self) -> int:
        """How many images there are."""
        return self.names.count(b"\0")


class Scan:
    """The images below `root`, folder by folder in sorted order, and a FACT for each of them.

    With `path`, `save` writes what is known there.
    """

    def __init__(
        self, root: Path, listings: dict[str, Listing], facts: np.ndarray, path: Path | None = None
    ) -> None:
        self.root = root
        self.listings = listings
        self.facts = facts
        self.path = path
        self.changed = True

    def list_names(self) -> Iterator[tuple[str, list[str]]]:
        """Yield each folder, relative to the root and "" for the root itself, with its images."""
        for folder, listing in self.listings.items():
            yield folder, listing.split()

    def count_skipped(self) -> dict[str, int]:
        """Return how many files of which kind are no images by their names."""
        counts: Counter[str] = Counter()
        for listing in self.listings.values():
            counts.update(listing.others)
        return dict(sorted(counts.items()))

    def has_only_text_names(self) -> bool:
        """Return whether the names of all images and folders are UTF-8."""
        # Folder by folder: as bytes, the names of ImageNet take a fiftieth of a second.
        return all(
            is_text(names)
            for folder, listing in self.listings.items()
            for names in (os.fsencode(folder), listing.names)
        )

    def list_paths(self) -> list[str]:
        """Return the images relative to the root, those of a folder before those below it."""
        paths: list[str] = []
        for folder, names in self.list_names():
            prefix = f"{folder}/" if folder else ""
            paths += [prefix + name for name in names]
        return paths

    def find_unknown(self, positions: np.ndarray) -> np.ndarray:
        """Return which of the images at these positions in the scan were not looked at yet."""
        return np.flatnonzero(self.facts["whole"][positions] == UNKNOWN)

    def look_at_files(
        self,
        paths: Sequence[str],
        positions: np.ndarray,
        missing: np.ndarray,
        report: ProgressCallback,
    ) -> None:
        """Look at the `missing` ones of `paths`, which have these positions in the scan."""
        # By index, as a million paths with the root before them are hundreds of MB.
        looks = map_in_chunks(
            lambda index: look_at_file(f"{self.root}/{paths[index]}"), missing.tolist(), THREADS
        )
        found = with_progress(looks, len(missing), report)
        self.facts[positions[missing]] = np.fromiter(found, dtype=FACT, count=len(missing))
        self.changed = True

    def mark_whole(self, indices: Sequence[int]) -> None:
        """Note that these images were decoded."""
        self.facts["whole"][list(indices)] = WHOLE
        self.changed = self.changed or len(indices) > 0

    def check_same_files(self) -> None:
        """Raise SourceError if images were added or removed since the folders were listed."""
        now = list_folders(self.root, self.listings)
        added, removed = compare_names(self.listings, now)
        if added or removed:
            raise SourceError(
                f"{self.root}: its images changed meanwhile: {describe_change(added, removed)}; "
                "start again when nothing writes there any more"
            )

    def save(self) -> None:
        """Remember the scan; a folder that cannot be written is none of the caller's problems."""
        if self.path is None or not self.changed:
            return
        joined = "".join(f"{folder}\0" for folder in self.listings)
        skipped = "".join(
            f"{folder}/{name}\0".lstrip("/")
            for folder, listing in self.listings.items()
            for name in listing.skipped
        )
        others = {
            folder: dict(listing.others)
            for folder, listing in self.listings.items()
            if listing.others
        }
        arrays = {
            "format": np.array(FORMAT),
            "root": to_array(os.fsencode(self.root.absolute())),
            "folders": to_array(os.fsencode(joined)),
            "skipped": to_array(os.fsencode(skipped)),
            "mtimes": np.array([listing.mtime_ns for listing in self.listings.values()]),
            "counts": np.array([listing.count for listing in self.listings.values()]),
            "names": to_array(b"".join(listing.names for listing in self.listings.values())),
            "others": to_array(json.dumps(others).encode()),
            "facts": self.facts,
        }
        try:
            with replace_atomically(self.path) as temporary, temporary.open("wb") as stream:
                np.savez(stream, allow_pickle=False, **arrays)
                stream.flush()
                os.fsync(stream.fileno())
        except OSError as error:
            logger.info("%s: the scan is not remembered (%s)", self.path, error)
        self.changed = False


def is_text(name: bytes) -> bool:
    """Return whether bytes are UTF-8."""
    try:
        name.decode()
    except UnicodeDecodeError:
        return False
    return True


def to_array(content: bytes) -> np.ndarray:
    """Return bytes as an array, as a file of NumPy holds them."""
    return np.frombuffer(content, dtype=np.uint8)


def scan_folder() -> Path | None:
    """Return the folder of this user's scans; None for a user without home folder.

    Where compute nodes have another home, a job lists the images itself.
    """
    folder = cache_folder()
    return folder and folder / "scans"


def scan_path(folder: Path, root: Path) -> Path:
    """Return where the scan of the images below `root` is remembered."""
    name = hashlib.sha256(os.fsencode(root.absolute())).hexdigest()[:16]
    return folder / f"{name}.npz"


def scan_images(root: Path, memory: Path | None = None) -> Scan:
    """List the images below `root`; links are followed. What `memory` remembers of it is reused.

    Machine-made folders are skipped; one line of the log names them. Raises SourceError for links
    that lead in a circle, and for folders that cannot be read.

    Args:
        root: the folder.
        memory: the folder of remembered scans; without it, nothing is remembered.
    """
    path = None if memory is None else scan_path(memory, root)
    before = read_scan(root, path)
    try:
        listings = list_folders(root, before.listings if before else {})
    except OSError as error:
        raise SourceError(f"{error.filename or root}: not readable ({error.strerror})") from error
    skipped = [
        f"{folder}/{name}".lstrip("/")
        for folder, listing in listings.items()
        for name in listing.skipped
    ]
    if skipped:
        logger.info(
            "%s: %d hidden folders and @eaDir skipped: %s",
            root,
            len(skipped),
            format_names(sorted(skipped)),
        )
    if before is not None and is_same(before.listings, listings):
        # Nothing is copied: the facts of ImageNet are 22 MB.
        scan = before
    else:
        scan = Scan(root, listings, np.full(count_images(listings), NO_FACT), path)
        if before is not None:
            take_over_facts(scan, before)
    if counts := scan.count_skipped():
        logger.info("%s: %s", root, describe_skipped(counts))
    if before is not None:
        forget_changed_files(scan)
    return scan


def is_same(before: Mapping[str, Listing], now: Mapping[str, Listing]) -> bool:
    """Return whether no folder was listed anew, and none is gone."""
    return len(before) == len(now) and all(
        before.get(folder) is listing for folder, listing in now.items()
    )


def count_images(listings: Mapping[str, Listing]) -> int:
    """Return the images of all folders."""
    return sum(listing.count for listing in listings.values())


def list_folders(root: Path, before: dict[str, Listing]) -> dict[str, Listing]:
    """Return the listing of each folder below `root`, sorted; folders are listed in parallel."""
    listings: dict[str, Listing] = {}
    level: list[tuple[str, frozenset[tuple[int, int]]]] = [("", frozenset())]
    while level:
        # Few folders to a thread at once: each is a request to a file server, and one that was not
        # listed before takes long.
        found = map_in_chunks(
            lambda item: list_folder(root, *item, before.get(item[0])), level, THREADS, chunk=8
        )
        below = []
        for (folder, _), (listing, around) in zip(level, found, strict=True):
            listings[folder] = listing
            below += [(f"{folder}/{name}".lstrip("/"), around) for name in listing.below]
        level = below
    return {folder: listings[folder] for folder in sorted(listings)}


def list_folder(
    root: Path, folder: str, above: frozenset[tuple[int, int]], before: Listing | None
) -> tuple[Listing, frozenset[tuple[int, int]]]:
    """Return the listing of one folder, `before` if it is unchanged; and `above` with this folder.

    `above` are the folders that lead to it, by device and inode.
    """
    path = f"{root}/{folder}" if folder else str(root)
    status = os.stat(path)
    identity = (status.st_dev, status.st_ino)
    if identity in above:
        raise SourceError(f"{path}: a link to a folder above it, so images repeat without end")
    around = above | {identity}
    if before is not None and before.mtime_ns == status.st_mtime_ns:
        return before, around

    names: list[str] = []
    others: list[str] = []
    below: list[str] = []
    skipped: list[str] = []
    with os.scandir(path) as entries:
        for entry in entries:
            # Without a system call: folders tell of what kind their entries are. Only links and
            # some old file systems need a stat.
            if not entry.is_dir():
                (names if is_image_name(entry.name) else others).append(entry.name)
            elif is_machine_made(entry.name):
                skipped.append(entry.name)
            else:
                below.append(entry.name)
    settled = time.time_ns() - status.st_mtime_ns > SETTLED_NS
    joined = "".join(f"{name}\0" for name in sorted(names))
    listing = Listing(
        os.fsencode(joined),
        status.st_mtime_ns if settled else 0,
        tuple(sorted(below)),
        tuple(sorted(skipped)),
        count_skipped(others),
    )
    return listing, around


def read_scan(root: Path, path: Path | None) -> Scan | None:
    """Return the remembered scan of `root`, or None if there is none that can be read."""
    if path is None or not path.is_file():
        return None
    try:
        with np.load(path, allow_pickle=False) as content:
            if int(content["format"]) != FORMAT or content["root"].tobytes() != os.fsencode(
                root.absolute()
            ):
                return None
            return parse_scan(root, path, {name: content[name] for name in content.files})
    except UNREADABLE as error:
        logger.warning("%s: not a readable scan (%s), %s is scanned anew", path, error, root)
        return None


def parse_scan(root: Path, path: Path, arrays: dict[str, np.ndarray]) -> Scan:
    """Return the scan in the arrays of a file. Raises ValueError if they do not fit together."""
    folders = os.fsdecode(arrays["folders"].tobytes()).split("\0")[:-1]
    below = group_by_parent(folders)
    skipped = group_by_parent(os.fsdecode(arrays["skipped"].tobytes()).split("\0")[:-1])
    others = json.loads(arrays["others"].tobytes())
    names = arrays["names"].tobytes()
    # Where each name ends tells where those of each folder end.
    ends = np.flatnonzero(arrays["names"] == 0) + 1
    bounds = np.concatenate([[0], ends])[np.concatenate([[0], np.cumsum(arrays["counts"])])]
    facts = arrays["facts"]
    if facts.dtype != FACT or len(facts) != len(ends) or bounds[-1] != len(names):
        raise ValueError("its parts do not fit together")
    listings = {
        folder: Listing(
            names[start:stop],
            mtime_ns,
            tuple(below.get(folder, ())),
            tuple(skipped.get(folder, ())),
            others.get(folder, {}),
        )
        for folder, start, stop, mtime_ns in zip(
            folders,
            bounds[:-1].tolist(),
            bounds[1:].tolist(),
            arrays["mtimes"].tolist(),
            strict=True,
        )
    }
    scan = Scan(root, listings, facts, path)
    scan.changed = False
    return scan


def group_by_parent(paths: Sequence[str]) -> dict[str, list[str]]:
    """Return the last part of each path by what comes before it; "" itself has no parent."""
    groups: dict[str, list[str]] = {}
    for path in filter(None, paths):
        parent, _, name = path.rpartition("/")
        groups.setdefault(parent, []).append(name)
    return groups


def take_over_facts(scan: Scan, before: Scan) -> None:
    """Copy what is known of the images of unchanged folders; log how the others differ."""
    positions = dict(zip(before.listings, count_before(before), strict=True))
    for (folder, listing), start in zip(scan.listings.items(), count_before(scan), strict=True):
        if before.listings.get(folder) is listing:
            at = positions[folder]
            stop = at + listing.count
            scan.facts[start : start + listing.count] = before.facts[at:stop]
    added, removed = compare_names(before.listings, scan.listings)
    if added or removed:
        change = describe_change(added, removed)
        logger.warning("%s: changed since the last scan: %s", scan.root, change)


def compare_names(
    before: dict[str, Listing], now: dict[str, Listing]
) -> tuple[list[str], list[str]]:
    """Return the images that are only in the later listings, and those only in the earlier ones."""
    added: list[str] = []
    removed: list[str] = []
    for folder in sorted(before.keys() | now.keys()):
        old = before.get(folder)
        new = now.get(folder)
        if old is new or (old is not None and new is not None and old.names == new.names):
            continue
        added += sorted(name_files(folder, new) - name_files(folder, old))
        removed += sorted(name_files(folder, old) - name_files(folder, new))
    return added, removed


def describe_change(added: list[str], removed: list[str]) -> str:
    """Return how many images were added and removed, with the first of their names."""
    return "; ".join(
        f"{len(names)} {what}: {format_names(names)}"
        for what, names in (("added", added), ("removed", removed))
        if names
    )


def count_before(scan: Scan) -> list[int]:
    """Return how many images lie before those of each folder."""
    counts = [listing.count for listing in scan.listings.values()]
    return [0, *np.cumsum(counts).tolist()[:-1]]


def name_files(folder: str, listing: Listing | None) -> set[str]:
    """Return the paths of the images of a listing."""
    return (
        {f"{folder}/{name}".lstrip("/") for name in listing.split()}
        if listing is not None
        else set()
    )


def forget_changed_files(scan: Scan) -> None:
    """Forget all facts if one of a thousand files has another size or time than is remembered."""
    known = np.flatnonzero(scan.facts["whole"] != UNKNOWN)
    chosen = known[:: max(1, len(known) // SAMPLES)]
    paths = dict(pick_paths(scan, chosen))
    changed = []
    for index, path in paths.items():
        fact = scan.facts[index]
        try:
            found = os.stat(f"{scan.root}/{path}")
            same = (found.st_size, found.st_mtime_ns) == (fact["size"], fact["mtime_ns"])
        except OSError:
            same = not fact["mtime_ns"]
        if not same:
            changed.append(path)
    if changed:
        logger.warning(
            "%s: %d of %d sampled images changed since the last scan, so all are looked at again: "
            "%s",
            scan.root,
            len(changed),
            len(paths),
            format_names(changed),
        )
        scan.facts[:] = NO_FACT


def pick_paths(scan: Scan, indices: np.ndarray) -> Iterator[tuple[int, str]]:
    """Yield the paths of some images, which are given in rising order, with their index."""
    starts = np.array([*count_before(scan), len(scan.facts)])
    for number, (folder, listing) in enumerate(scan.listings.items()):
        first, last = np.searchsorted(indices, starts[number : number + 2])
        if first == last:
            continue
        for index in indices[first:last].tolist():
            yield index, f"{folder}/{listing.pick(index - starts[number])}".lstrip("/")


def look_at_file(path: str) -> tuple[int, int, int]:
    """Return size, time, and whether a file ends as a JPEG or PNG does; zeros if it is not there.

    A file that does not may still be whole (other formats, bytes after the end): decode it to know.
    Neither is one whole that has more pixels than Pillow reads.
    """
    try:
        descriptor = open_regular_file(Path(path))
    except OSError:
        return 0, 0, CUT
    try:
        found = os.fstat(descriptor)
        last = os.pread(descriptor, 8, max(0, found.st_size - 8))
    except OSError:
        return 0, 0, CUT
    finally:
        os.close(descriptor)
    ending = next((end for end in FILE_ENDS if last.endswith(end)), None)
    whole = ending is not None and (
        found.st_size < SMALLEST_HUGE_FILE[ending] or has_known_header(path)
    )
    return found.st_size, found.st_mtime_ns, WHOLE if whole else CUT


def ends_whole(path: Path) -> bool:
    """Return whether a file ends as a JPEG or PNG does, and is no larger than Pillow reads."""
    return look_at_file(str(path))[2] == WHOLE


def has_known_header(path: str) -> bool:
    """Return whether Pillow takes a file for an image, of no more pixels than it reads."""
    try:
        with open_image(Path(path)):
            return True
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError):
        return False


def is_machine_made(folder: str) -> bool:
    """Return whether programs make folders of this name for themselves: hidden ones, `@eaDir`."""
    # .ipynb_checkpoints, .git; @eaDir holds the thumbnails of Synology disk stations.
    return folder.startswith(".") or folder == "@eaDir"
