"""Convert an image folder into a `.beton` file with sidecar, and verify one."""

import io
import logging
import shutil
import time
import zlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Literal

import numpy as np

from mugs.data.prefetch import ProgressCallback, ignore_progress, map_prefetched
from mugs.data.sources import beton
from mugs.data.sources.base import FileStamp, SourceError, format_names, open_image
from mugs.data.sources.beton import (
    BetonSource,
    EncodedImage,
    Sidecar,
    Storage,
    read_sidecar,
    sidecar_path,
    write_sidecar,
)
from mugs.data.sources.changes import count_changes, find_changes
from mugs.data.sources.decode import DecodeError, decode_rgb
from mugs.data.sources.folder import FolderSource
from mugs.data.sources.parts import BetonParts
from pipeline.control import Control

logger = logging.getLogger(__name__)
# Bad files listed below the first line of a refusal.
MAX_LISTED = 200
# A kill loses at most the work of this time. Saving waits until all images are on the disk.
SAVE_SECONDS = 10.0
Phase = Literal["unpack", "convert", "checksum"]
PhaseCallback = Callable[[Phase, int, int, int], None]
"""Is called with the phase of a conversion, the images or bytes that are done of it, their total,
and the size of the file so far."""


@dataclass(frozen=True)
class LoadedImage:
    """An image of a source as it will be stored, or why it cannot be; and its file's stamp."""

    stamp: FileStamp
    encoded: EncodedImage | None
    problem: str = ""


def load_image(source: FolderSource, storage: Storage, index: int) -> LoadedImage:
    """Read, check and encode an image."""
    name = source.name(index)
    try:
        data, stamp = source.read_with_stamp(index)
    except OSError as error:
        return LoadedImage(source.stamp(index), None, str(error))
    try:
        return LoadedImage(stamp, encode_image(data, name, source.label(index), storage))
    except DecodeError as error:
        return LoadedImage(stamp, None, str(error).removeprefix(f"{name}: "))


def encode_image(data: bytes, name: str, label: int, storage: Storage = "jpeg") -> EncodedImage:
    """Return an image as it is stored: RGB and gray JPEG as it is, anything else encoded anew.

    With `storage="original"` all others are stored as they are, too.

    Raises DecodeError naming an image that is not whole.
    """
    # Every image is decoded once, also those that are stored unchanged: training must not find out.
    rgb = decode_rgb(data, name)
    with open_image(io.BytesIO(data)) as image:
        plain = image.format == "JPEG" and image.mode in ("RGB", "L")
        changes = find_changes(image, stored_anew=not plain and storage == "jpeg")
    if not plain and storage == "jpeg":
        buffer = io.BytesIO()
        rgb.save(buffer, format="JPEG", quality=95, subsampling=0)
        data = buffer.getvalue()
    if len(data) > beton.PAGE:
        raise DecodeError(f"{name}: {len(data)} bytes, the most is {beton.PAGE}")
    return EncodedImage(data, rgb.width, rgb.height, label, changes)


def ignore_phase(phase: Phase, done: int, total: int, size: int) -> None:
    """Do nothing: the default where a caller may ask for the progress of each phase."""


def convert_to_beton(
    source: FolderSource,
    path: Path,
    *,
    allow_bad: Sequence[str] = (),
    storage: Storage = "jpeg",
    threads: int = 4,
    report: PhaseCallback = ignore_phase,
    control: Control | None = None,
) -> Sidecar:
    """Convert the images of `source` into `path`, unless that is done already.

    Each image is read once. A conversion that was stopped or killed goes on from its last part, at
    most SAVE_SECONDS ago, and gives the same bytes. Raises SourceError with all bad files, unless
    each is named in `allow_bad` (paths relative to the folder): then they are left out. After the
    files were repaired, the next start goes on from the first of them.

    Args:
        source: the images.
        path: the file to write, with a sidecar beside it.
        allow_bad: bad images that are left out.
        storage: how images are stored that are not RGB or gray JPEG.
        threads: images that are decoded at the same time.
        report: is told how far each phase is.
        control: the job around it, which may ask to stop.
    """
    unpacked = path.with_name(path.name + ".unpacked")
    if (done := find_converted(source, path, allow_bad)) is not None:
        # Left by a kill right before the end.
        shutil.rmtree(unpacked, ignore_errors=True)
        return done
    # A stale one would count for the new file.
    sidecar_path(path).unlink(missing_ok=True)
    versions = {"pillow": version("pillow"), "numpy": version("numpy")}
    source.prepare(unpacked, lambda done, size: report("unpack", done, size, size), control)
    parts = BetonParts(source, path, versions, storage)
    parts.resume(threads)
    try:
        bad = _append_images(parts, allow_bad, threads, report, control)
        check_bad_allowed(source, bad, allow_bad)
        # Data that somebody is still unpacking would be converted in part.
        source.check_same_files()
        warn_of_changed_files(source, parts.rows)
        digest = parts.finish(lambda done, size: report("checksum", done, size, size))
    finally:
        parts.close()
    sidecar = _describe_file(parts, digest, bad)
    write_sidecar(path, sidecar)
    parts.remove()
    shutil.rmtree(unpacked, ignore_errors=True)
    return sidecar


def _describe_file(parts: BetonParts, digest: str, left_out: dict[str, str]) -> Sidecar:
    """Return the sidecar of the finished file; its rows are let go."""
    source = parts.source
    keep = np.flatnonzero(parts.rows["size"])
    sizes = parts.rows["size"][keep]
    crc32 = parts.rows["crc32"][keep]
    # Of the files as they were read.
    fingerprint = source.fingerprint_of(parts.rows["file_size"])
    changes = count_changes(parts.rows["changes"])
    # 54 MB of ImageNet: the lists that come next take more.
    parts.forget_rows()
    return Sidecar(
        classes=source.classes,
        names=[source.name(int(i)) for i in keep],
        sizes=sizes.tolist(),
        crc32=crc32.tolist(),
        fingerprint=fingerprint,
        file_size=parts.path.stat().st_size,
        sha256=digest,
        left_out=left_out,
        versions=dict(parts.versions),
        labels=None if source.by_folder else [source.label(int(i)) for i in keep],
        changes=changes,
        skipped=dict(source.skipped),
    )


def warn_of_changed_files(source: FolderSource, rows: np.ndarray) -> None:
    """Log which files were others when they were scanned: they were converted as they are now."""
    changed = source.find_changed_since_scan(rows["file_size"], rows["mtime_ns"])
    if changed:
        logger.warning(
            "%s: %d images changed since they were scanned: %s",
            source.root,
            len(changed),
            format_names(changed),
        )


def find_converted(source: FolderSource, path: Path, allow_bad: Sequence[str]) -> Sidecar | None:
    """Return the sidecar of `path` if the file is complete and of these images."""
    try:
        done = read_sidecar(path)
    except SourceError:
        # Not there, or not complete.
        return None
    if done.fingerprint != source.fingerprint or not set(done.left_out) <= set(allow_bad):
        return None
    logger.info("%s is already there, with %d images", path, len(done.names))
    return done


def _append_images(
    parts: BetonParts,
    allow_bad: Sequence[str],
    threads: int,
    report: PhaseCallback,
    control: Control | None,
) -> dict[str, str]:
    """Append the images that are missing; return all bad ones, name -> reason.

    From the first bad image that is not allowed, the others are only checked, so that one message
    names all of them.
    """
    source = parts.source
    total = len(source)
    rest = range(parts.done, total)
    refused: dict[str, str] = {}
    saved_at = time.monotonic()
    for index, image in zip(
        rest, map_prefetched(partial(load_image, source, parts.storage), rest, threads), strict=True
    ):
        name = source.name(index)
        if image.encoded is None and name not in allow_bad:
            refused[name] = image.problem
        elif not refused and image.encoded is None:
            parts.leave_out(image.problem, image.stamp)
        elif not refused and image.encoded is not None:
            parts.append(image.encoded, image.stamp)

        report("convert", index + 1, total, parts.position)
        stop = control is not None and control.stop_requested()
        if stop or time.monotonic() - saved_at > SAVE_SECONDS:
            parts.save()
            saved_at = time.monotonic()
        if control is not None:
            control.heartbeat(index + 1)
            if stop:
                control.interrupted(parts.saved)
    parts.save()
    if control is not None:
        control.finish()
    return {**parts.left_out, **refused}


def check_whole_images(
    source: FolderSource,
    *,
    allow_bad: Sequence[str] = (),
    threads: int = 4,
    report: ProgressCallback = ignore_progress,
) -> None:
    """Raise SourceError, as `convert_to_beton` would, for images that were cut short.

    Damage in the middle of a file is found only when it is converted.
    """
    # Only files that do not end as a JPEG or PNG are decoded. So a million of these take minutes
    # instead of hours; images of other formats are all decoded, the first time.
    suspects = source.find_cut_images(report)
    bad = find_bad_images(source, suspects, threads) if suspects else {}
    source.remember_whole([index for index in suspects if source.name(index) not in bad])
    check_bad_allowed(source, bad, allow_bad)


def check_bad_allowed(
    source: FolderSource, bad: Mapping[str, str], allow_bad: Sequence[str]
) -> None:
    """Raise SourceError for the bad images, name -> reason, that are not allowed.

    The first line of the message names them, then comes one line each.
    """
    refused = {name: why for name, why in bad.items() if name not in allow_bad}
    lines = [f"  {name}: {why}" for name, why in refused.items()]
    if len(lines) > MAX_LISTED:
        lines[MAX_LISTED:] = [f"  ... and {len(refused) - MAX_LISTED} more"]
    if refused:
        raise SourceError(
            f"{source.root}: {len(refused)} of {len(source)} files are not usable images: "
            f"{format_names(list(refused))}; repair or remove them, or name them in allow_bad to "
            "leave them out\n" + "\n".join(lines)
        )


def find_bad_images(source: FolderSource, indices: Sequence[int], threads: int) -> dict[str, str]:
    """Decode these images; return name -> reason of those that fail."""
    loaded = map_prefetched(partial(load_image, source, "jpeg"), indices, threads)
    return {
        source.name(index): image.problem
        for index, image in zip(indices, loaded, strict=True)
        if image.encoded is None
    }


def verify_beton(path: Path, *, every: int = 1) -> list[str]:
    """Check every `every`-th sample: checksum, decoding, label. Return a line for each bad one.

    A file that cannot be opened gives one line.
    """
    try:
        source = BetonSource(path)
    except SourceError as error:
        return [str(error)]
    samples = range(0, len(source), every)
    lines = map_prefetched(lambda i: find_sample_problem(source, i), samples, threads=4)
    return [line for line in lines if line]


def has_recorded_label(source: BetonSource, index: int) -> bool:
    """Return whether a sample has the recorded label, or else that of its class folder."""
    label = source.label(index)
    if source.sidecar.labels is not None:
        return label == source.sidecar.labels[index]
    folder = source.name(index).split("/")[0]
    return 0 <= label < len(source.classes) and source.classes[label] == folder


def find_sample_problem(source: BetonSource, index: int) -> str | None:
    """Return what is wrong with a sample, or None."""
    where = source.describe(index)
    data = source.read(index)
    if zlib.crc32(data) != source.sidecar.crc32[index]:
        return f"{where} is damaged: its CRC-32 differs; convert again"
    if not has_recorded_label(source, index):
        return f"{where} carries label {source.label(index)}"
    try:
        decode_rgb(data, where)
    except DecodeError as error:
        return str(error)
    return None
