"""A `.beton` file in the making: what is on the disk survives a kill, and the next start goes on.

    <name>.beton.parts/data           the images as they will lie in the file, without its tables
                       00000000.npz   of the images from number 0 on, where each lies in `data`
                       00012345.npz   of those from 12345 on, and so forth

A part is written after its images are on the disk. Where an image lies follows from the images
before it, so the finished file has the same bytes however often the conversion was stopped.
"""

import hashlib
import io
import json
import logging
import os
import shutil
import zipfile
import zlib
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import IO, Any

import numpy as np

from mugs.data.prefetch import ProgressCallback, map_in_chunks
from mugs.data.sources import beton
from mugs.data.sources.base import FileStamp, format_names
from mugs.data.sources.beton import SAMPLE, EncodedImage, Storage
from mugs.data.sources.folder import FolderSource
from pipeline.files import make_folder, sync_path, write_atomic

logger = logging.getLogger(__name__)
# What is known of each image of the source; `size` 0 means that it is left out. `file_size` and
# `mtime_ns` are those of the file that was read, the others are those of the stored image.
ROW = np.dtype(
    [
        ("file_size", "<i8"),
        ("mtime_ns", "<i8"),
        ("position", "<i8"),
        ("size", "<i8"),
        ("crc32", "<u4"),
        ("width", "<u2"),
        ("height", "<u2"),
        ("changes", "<u2"),
    ]
)
# What Python raises for a part that was damaged.
UNREADABLE = (OSError, ValueError, KeyError, TypeError, EOFError, zipfile.BadZipFile)


@dataclass(frozen=True)
class Part:
    """Images `start` to `start + len(rows)`; `facts` has to be what the same images give today."""

    start: int
    rows: np.ndarray
    # Position in the file after them.
    end: int
    left_out: Mapping[str, str]
    facts: Mapping[str, Any]


class BetonParts:
    """Appends the images of `source` to the working file of `path`.

    Attributes:
        done: images of the source that were read, `saved` of them survive a kill.
        resumed: images that were read by earlier starts.
        rows: of each image of the source, a ROW.
        left_out: images that are not in the file, name -> reason.
    """

    def __init__(
        self, source: FolderSource, path: Path, versions: Mapping[str, str], storage: Storage
    ) -> None:
        self.source = source
        self.path = path
        self.versions = versions
        self.storage = storage
        self.folder = path.with_name(path.name + ".parts")
        self.data = self.folder / "data"
        self.rows = np.zeros(len(source), dtype=ROW)
        self.left_out: dict[str, str] = {}
        self.done = self.saved = self.resumed = 0
        self.first_page = self.position = beton.find_first_page(len(source))

    def resume(self, threads: int) -> None:
        """Take over the parts of earlier starts whose files are still the same; remove the rest."""
        make_folder(self.folder)
        if self.path.exists() and not self.data.exists():
            # Killed between the two last steps: the file has its name, but no sidecar yet.
            os.replace(self.path, self.data)
        parts = self._list_usable(threads)
        for part in parts:
            self.left_out |= part.left_out
            self.done = part.start + len(part.rows)
            self.position = part.end
        self.saved = self.resumed = self.done
        kept = {self._part_path(part.start) for part in parts}
        for path in self.folder.iterdir():
            if path != self.data and path not in kept:
                path.unlink()
        self._stream: IO[bytes] = self.data.open("r+b" if self.data.exists() else "w+b")
        # What was written after the last part is written again.
        self._stream.truncate(self.position)
        self._stream.seek(self.position)
        if self.resumed:
            logger.info("%s: resumes after %d of %d images", self.path, self.done, len(self.source))

    def _part_path(self, start: int) -> Path:
        return self.folder / f"{start:08d}.npz"

    def _list_usable(self, threads: int) -> list[Part]:
        """Return the parts, without gap from the first image on, of which nothing has changed.

        Their rows are taken over, and those of more parts perhaps, which are written again.
        """
        parts: list[Part] = []
        stop = 0
        size = self.data.stat().st_size if self.data.exists() else -1
        while (part := read_part(self._part_path(stop))) is not None:
            stop = part.start + len(part.rows)
            if stop > len(self.source) or part.end > size:
                break
            if part.facts != self._facts(part.start, stop):
                break
            rows = self.rows[part.start : stop]
            rows[:] = part.rows
            # A view, as a second table of ImageNet would take 54 MB.
            parts.append(replace(part, rows=rows))
        rows = self.rows[: sum(len(part.rows) for part in parts)]
        # Their files too: one that was repaired meanwhile is converted again, with all after it.
        changed = find_changed_files(self.source, rows, threads)
        if changed:
            names = format_names([self.source.name(index) for index in changed])
            logger.warning(
                "%s: %d files changed since an earlier start: %s", self.path, len(changed), names
            )
        first = min(changed, default=len(rows))
        return [part for part in parts if part.start + len(part.rows) <= first]

    def _facts(self, start: int, stop: int) -> dict[str, Any]:
        """Return what the stored bytes of these images follow from, besides their files."""
        digest = hashlib.sha256()
        for index in range(start, stop):
            digest.update(f"{self.source.name(index)}\0{self.source.label(index)}\n".encode())
        return {
            "names": digest.hexdigest(),
            "first_page": self.first_page,
            "page": beton.PAGE,
            "versions": dict(self.versions),
            "storage": self.storage,
        }

    def append(self, image: EncodedImage, stamp: FileStamp) -> None:
        """Write the next image of the source."""
        position = beton.place_image(self.position, len(image.data))
        # Seeking beyond the end leaves zeros up to the next page.
        if position != self.position:
            self._stream.seek(position)
        self._stream.write(image.data)
        self.rows[self.done] = (
            stamp.size,
            stamp.mtime_ns,
            position,
            len(image.data),
            zlib.crc32(image.data),
            image.width,
            image.height,
            image.changes,
        )
        self.position = position + len(image.data)
        self.done += 1

    def leave_out(self, why: str, stamp: FileStamp) -> None:
        """Note that the next image of the source is not in the file."""
        self.left_out[self.source.name(self.done)] = why
        self.rows[self.done] = (stamp.size, stamp.mtime_ns, -1, 0, 0, 0, 0, 0)
        self.done += 1

    def save(self) -> None:
        """Make what was read so far survive a kill."""
        if self.saved == self.done:
            return
        self._stream.flush()
        os.fsync(self._stream.fileno())
        names = {self.source.name(index) for index in range(self.saved, self.done)}
        write_part(
            self._part_path(self.saved),
            Part(
                self.saved,
                self.rows[self.saved : self.done],
                self.position,
                {name: why for name, why in self.left_out.items() if name in names},
                self._facts(self.saved, self.done),
            ),
        )
        self.saved = self.done

    def close(self) -> None:
        """Close the working file."""
        self._stream.close()

    def finish(self, report: ProgressCallback) -> str:
        """Put the complete file at its path; return its SHA-256.

        Raises:
            OSError: an image of an earlier start is not what was written; its part is removed.
        """
        self.save()
        keep = np.flatnonzero(self.rows["size"])
        # The tables at the front are shorter without the images that are left out.
        shift = beton.find_first_page(len(keep)) - self.first_page
        finished = self.data if shift == 0 else self._copy_shifted(shift)
        self._write_tables(finished, keep, shift)
        digest = self._hash(finished, shift, report)
        os.replace(finished, self.path)
        sync_path(self.path.parent)
        return digest

    def _write_tables(self, finished: Path, keep: np.ndarray, shift: int) -> None:
        """Complete a file that has only images: those numbered `keep`, moved by `shift` bytes."""
        samples = np.zeros(len(keep), dtype=SAMPLE)
        samples["image"]["width"] = self.rows["width"][keep]
        samples["image"]["height"] = self.rows["height"][keep]
        samples["image"]["data_ptr"] = self.rows["position"][keep] + shift
        labels = (self.source.label(index) for index in map(int, keep))
        samples["label"] = np.fromiter(labels, dtype=np.int64, count=len(keep))
        with finished.open("r+b") as stream:
            beton.write_tables(stream, samples, self.rows["size"][keep], self.position + shift)

    def _copy_shifted(self, shift: int) -> Path:
        """Return a copy of the working file with its images moved by `shift` bytes.

        A copy, as the parts describe the original until the end.
        """
        moved = self.folder / "shifted"
        with self.data.open("rb") as original, moved.open("wb") as stream:
            original.seek(self.first_page)
            stream.seek(self.first_page + shift)
            shutil.copyfileobj(original, stream, 1 << 20)
            stream.truncate(self.position + shift)
        return moved

    def _hash(self, finished: Path, shift: int, report: ProgressCallback) -> str:
        """Return the SHA-256 of the finished file; check what earlier starts wrote on the way.

        What this start wrote needs no check, and most conversions have but one.
        """
        digest = hashlib.sha256()
        size = finished.stat().st_size
        old = self.rows[: self.resumed]
        if not old["size"].all():
            old = old[old["size"] > 0]
        done = 0
        with ThreadPoolExecutor(1) as pool:
            for page, rows in zip(
                read_pages(finished), iter_rows_by_page(old, shift), strict=False
            ):
                check = pool.submit(find_damaged, page, rows, done - shift)
                digest.update(page)
                if len(damaged := check.result()):
                    raise self._drop_part(int(damaged[0]), finished)
                done += len(page)
                report(done, size)
        return digest.hexdigest()

    def _drop_part(self, position: int, finished: Path) -> OSError:
        """Remove the part with the image at `position`; return the error to raise."""
        index = int(np.flatnonzero(self.rows["position"] == position)[0])
        starts = sorted(int(path.stem) for path in self.folder.glob("*.npz"))
        self._part_path(max(start for start in starts if start <= index)).unlink()
        return OSError(
            f"{finished}: image {index} ({self.source.name(index)}) is not what an earlier start "
            "wrote there; the next start converts it again"
        )

    def forget_rows(self) -> None:
        """Let the rows go once the file is finished."""
        self.rows = self.rows[:0].copy()

    def remove(self) -> None:
        """Remove the working files: the finished file and its sidecar are on the disk."""
        shutil.rmtree(self.folder)


def read_part(path: Path) -> Part | None:
    """Return a part, or None if it is not there or damaged."""
    try:
        with np.load(path, allow_pickle=False) as content:
            rows = content["rows"]
            facts = json.loads(content["facts"].tobytes())
        if rows.dtype != ROW or not len(rows):
            raise ValueError("other columns")
        return Part(rows=rows, **facts)
    except FileNotFoundError:
        return None
    except UNREADABLE as error:
        logger.warning("%s: not readable (%s), its images are converted again", path, error)
        return None


def write_part(path: Path, part: Part) -> None:
    """Write a part; it appears as a whole."""
    facts = {
        "start": part.start,
        "end": part.end,
        "left_out": dict(part.left_out),
        "facts": dict(part.facts),
    }
    buffer = io.BytesIO()
    # The format has a checksum of each array.
    np.savez(buffer, rows=part.rows, facts=np.frombuffer(json.dumps(facts).encode(), np.uint8))
    write_atomic(path, buffer.getvalue())


def find_changed_files(source: FolderSource, rows: np.ndarray, threads: int) -> list[int]:
    """Return which of the first `len(rows)` files have not the size and time of their row."""
    stamps = map_in_chunks(source.stamp, range(len(rows)), threads)
    known = zip(rows["file_size"], rows["mtime_ns"], strict=True)
    return [
        index
        for index, (stamp, before) in enumerate(zip(stamps, known, strict=True))
        if (stamp.size, stamp.mtime_ns) != before
    ]


def read_pages(path: Path) -> Iterator[bytes]:
    """Yield the content of a file, page by page."""
    with path.open("rb") as stream:
        while page := stream.read(beton.PAGE):
            yield page


def iter_rows_by_page(rows: np.ndarray, shift: int) -> Iterator[np.ndarray]:
    """Yield the rows of the images in each page, for ever; no image crosses a page."""
    pages = (rows["position"] + shift) // beton.PAGE
    number = 0
    while True:
        first, last = np.searchsorted(pages, (number, number + 1))
        yield rows[first:last]
        number += 1


def find_damaged(page: bytes, rows: np.ndarray, start: int) -> list[int]:
    """Return the positions of images with another CRC-32 in `page`, which begins at `start`."""
    view = memoryview(page)
    bounds = zip(
        rows["position"].tolist(), rows["size"].tolist(), rows["crc32"].tolist(), strict=True
    )
    return [
        position
        for position, size, crc in bounds
        if zlib.crc32(view[position - start : position - start + size]) != crc
    ]
