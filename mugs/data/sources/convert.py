"""Convert an image folder into a `.beton` file with sidecar, and verify one."""

import io
import logging
import zlib
from collections.abc import Mapping, Sequence
from importlib.metadata import version
from pathlib import Path

from PIL import Image

from mugs.data.prefetch import ProgressCallback, ignore_progress, map_prefetched, with_progress
from mugs.data.sources.base import FolderSource, SourceError, format_names
from mugs.data.sources.beton import (
    PAGE,
    BetonSource,
    EncodedImage,
    Sidecar,
    read_sidecar,
    write_beton,
    write_sidecar,
)
from mugs.data.sources.decode import DecodeError, decode_rgb
from pipeline.files import hash_file

logger = logging.getLogger(__name__)
# Bad files listed below the first line of a refusal.
MAX_LISTED = 200


def encode_image(data: bytes, name: str, label: int) -> EncodedImage:
    """Return an image as it is stored: RGB and gray JPEG as it is, anything else encoded anew.

    Raises DecodeError naming an image that is not whole.
    """
    # Every image is decoded once, also those that are stored unchanged: training must not find out.
    rgb = decode_rgb(data, name)
    with Image.open(io.BytesIO(data)) as image:
        unchanged = image.format == "JPEG" and image.mode in ("RGB", "L")
    if not unchanged:
        buffer = io.BytesIO()
        rgb.save(buffer, format="JPEG", quality=95, subsampling=0)
        data = buffer.getvalue()
    if len(data) > PAGE:
        raise DecodeError(f"{name}: {len(data)} bytes, the most is {PAGE}")
    return EncodedImage(data, rgb.width, rgb.height, label)


def convert_to_beton(
    source: FolderSource,
    path: Path,
    *,
    allow_bad: Sequence[str] = (),
    threads: int = 4,
    report: ProgressCallback = ignore_progress,
) -> Sidecar:
    """Convert the images of `source` into `path`, unless that is done already.

    Raises SourceError with all bad files, unless each is named in `allow_bad` (paths relative to
    the folder): then they are left out.
    """
    fingerprint = source.fingerprint
    try:
        done = read_sidecar(path)
        if done.fingerprint == fingerprint and set(done.left_out) <= set(allow_bad):
            logger.info("%s is already there, with %d images", path, len(done.names))
            return done
    except SourceError:
        # Not there, or not complete.
        pass
    # Two passes over the images: nothing is written before every image is known to be good, and one
    # message names all that are not.
    bad = find_bad_images(source, range(len(source)), threads, report)
    check_bad_allowed(source, bad, allow_bad)
    keep = [i for i in range(len(source)) if source.name(i) not in bad]
    images = map_prefetched(
        lambda i: encode_image(source.read(i), source.name(i), source.label(i)), keep, threads
    )
    sizes, crcs = write_beton(path, with_progress(images, len(keep), report), len(keep))
    sidecar = Sidecar(
        classes=source.classes,
        names=[source.name(i) for i in keep],
        sizes=sizes,
        crc32=crcs,
        fingerprint=fingerprint,
        file_size=path.stat().st_size,
        sha256=hash_file(path),
        left_out=bad,
        versions={"pillow": version("pillow"), "numpy": version("numpy")},
        labels=None if source.by_folder else [source.label(i) for i in keep],
    )
    write_sidecar(path, sidecar)
    return sidecar


def check_whole_images(
    source: FolderSource, *, allow_bad: Sequence[str] = (), threads: int = 4
) -> None:
    """Raise SourceError, as `convert_to_beton` would, for images that were cut short.

    Damage in the middle of a file is found only when it is converted.
    """
    # Only files that do not end as a JPEG or PNG are decoded. So a million of these take minutes
    # instead of hours; images of other formats are all decoded.
    ends = map_prefetched(source.ends_whole, range(len(source)), threads)
    suspects = [index for index, whole in enumerate(ends) if not whole]
    check_bad_allowed(source, find_bad_images(source, suspects, threads), allow_bad)


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


def find_bad_images(
    source: FolderSource,
    indices: Sequence[int],
    threads: int,
    report: ProgressCallback = ignore_progress,
) -> dict[str, str]:
    """Decode these images; return name -> reason of those that fail."""

    def check(index: int) -> tuple[str, str] | None:
        name = source.name(index)
        try:
            encode_image(source.read(index), name, 0)
        except (DecodeError, OSError) as error:
            return name, str(error).removeprefix(f"{name}: ")
        return None

    results = with_progress(map_prefetched(check, indices, threads), len(indices), report)
    return dict(found for found in results if found is not None)


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
