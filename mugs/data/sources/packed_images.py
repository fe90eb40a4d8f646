"""The images in tar and parquet files, one by one, with what their files say of them."""

import os
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

from mugs.data.prefetch import ProgressCallback, ignore_progress
from mugs.data.sources.base import SourceError, count_skipped, is_image_name, raise_if_any
from mugs.data.sources.parquet import iter_rows
from mugs.data.sources.tar import Member, list_tar

# `train-00003-of-00294`: one of so many; `shard-000003`: one of each number before it.
OF_MANY = re.compile(r"(.*?)(\d+)-of-(\d+)")
NUMBERED = re.compile(r"(.*?)(\d+)")
LABEL = ".cls"
REPORT_EVERY = 1000
# A label is a few digits.
LABEL_BYTES = 20


class FoundImage(NamedTuple):
    """An image: its name and label, if its file tells, and where it is.

    data_end: the last bytes of the image, where they were read anyway.
    """

    name: str
    label: int | None
    file: int
    row: int
    offset: int
    size: int
    data_end: bytes | None = None


def list_images(
    path: Path, files: Sequence[Path], report: ProgressCallback = ignore_progress
) -> tuple[list[FoundImage], dict[str, int]]:
    """Return the images in some files, and how many other files of which kind were skipped.

    `report` is told how many bytes of all files were gone through. Raises SourceError naming the
    file, and the member or row, that is wrong.
    """
    check_complete(path, files)
    total = sum(file.stat().st_size for file in files)
    before = 0
    images: list[FoundImage] = []
    members: list[list[Member]] = []
    for number, file in enumerate(files):
        if file.suffix == ".parquet":
            images += _list_rows(file, number)
        else:
            members.append([])
            for member in list_tar(file):
                members[-1].append(member)
                if len(members[-1]) % REPORT_EVERY == 0:
                    report(before + member.offset, total)
        before += file.stat().st_size
        report(before, total)
    if images:
        return images, {}
    if any(member.name.endswith(LABEL) for part in members for member in part):
        check_numbered(path, files)
        samples = [
            image
            for number, (file, part) in enumerate(zip(files, members, strict=True))
            for image in _list_samples(file, number, part)
        ]
        return samples, {}
    others = [m.name for part in members for m in part if not is_image_name(_last(m.name))]
    return _list_plain(files, members), count_skipped(map(_last, others))


def check_complete(path: Path, files: Sequence[Path]) -> None:
    """Raise SourceError if files that say how many there are of them are not all there."""
    for file in files:
        found = OF_MANY.fullmatch(file.stem)
        if found is None:
            continue
        names = {other.name for other in files}
        width = len(found[2])
        wanted = [
            f"{found[1]}{number:0{width}d}-of-{found[3]}{file.suffix}"
            for number in range(int(found[3]))
        ]
        raise_if_any(path, "files are missing", [name for name in wanted if name not in names])


def check_numbered(path: Path, files: Sequence[Path]) -> None:
    """Raise SourceError if numbered shards leave a number out."""
    parts = [NUMBERED.fullmatch(file.stem) for file in files]
    if len(files) < 2 or not all(parts):
        return
    groups: dict[str, list[int]] = {}
    for part in parts:
        if part is not None:
            groups.setdefault(part[1], []).append(int(part[2]))
    for prefix, numbers in groups.items():
        lost = sorted(set(range(max(numbers) + 1)) - set(numbers) - {0})
        raise_if_any(path, f"shards {prefix}... are missing", [str(number) for number in lost])


def _last(name: str) -> str:
    return name.rpartition("/")[2]


def _list_rows(file: Path, number: int) -> Iterator[FoundImage]:
    offset = 0
    for row, (name, label, data) in enumerate(iter_rows(file)):
        # Files may leave out the names; then the number of the row tells images apart.
        name = name or f"{file.stem}_{row:06d}.jpg"
        yield FoundImage(name, label, number, row, offset, len(data), data[-8:])
        offset += len(data)


def _list_samples(file: Path, number: int, members: Sequence[Member]) -> Iterator[FoundImage]:
    """Yield the samples of a WebDataset shard.

    Raises SourceError if the files of a sample are not together, or image or label are missing.
    """
    samples: dict[str, list[Member]] = {}
    previous = ""
    torn = []
    for member in members:
        folder, _, last = member.name.rpartition("/")
        key = f"{folder}/{last.partition('.')[0]}".lstrip("/")
        if key != previous and key in samples:
            torn.append(member.name)
        samples.setdefault(key, []).append(member)
        previous = key
    raise_if_any(file, "files are not beside those of their sample; sort the shard", torn)

    descriptor = os.open(file, os.O_RDONLY)
    try:
        for key, parts in samples.items():
            images = [part for part in parts if is_image_name(_last(part.name))]
            labels = [part for part in parts if part.name.endswith(LABEL)]
            if len(images) != 1 or len(labels) != 1:
                raise SourceError(
                    f"{file}: sample {key} has {len(images)} images and {len(labels)} labels (.cls)"
                )
            text = os.pread(descriptor, min(labels[0].size, LABEL_BYTES), labels[0].offset)
            if not text.strip().isdigit():
                raise SourceError(f"{file}: {labels[0].name} is no whole number")
            name = f"{key}.{images[0].name.rpartition('.')[2]}"
            yield FoundImage(name, int(text), number, 0, images[0].offset, images[0].size)
    finally:
        os.close(descriptor)


def _list_plain(files: Sequence[Path], members: Sequence[Sequence[Member]]) -> list[FoundImage]:
    """Return the images of tar files without labels; several files are a class each."""
    images = [
        FoundImage(member.name, None, number, 0, member.offset, member.size)
        for number, part in enumerate(members)
        for member in part
        if is_image_name(_last(member.name))
    ]
    if len(files) > 1 and not any("/" in image.name for image in images):
        return [image._replace(name=f"{files[image.file].stem}/{image.name}") for image in images]
    # The tar file of a folder has that folder around all classes.
    tops = {image.name.partition("/")[0] for image in images}
    if len(tops) == 1 and all(image.name.count("/") > 1 for image in images):
        return [image._replace(name=image.name.partition("/")[2]) for image in images]
    return images
