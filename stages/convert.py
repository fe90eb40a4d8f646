"""Convert images to FFCV files (`.beton`), one for training and one for validation.

The layouts of data sets are read in `mugs/data/sources/`; their settings are in
`stages/shared/image_data.py`.
"""

import hashlib
import os
import time
from collections.abc import Mapping
from contextlib import closing
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pipeline.manifest import ManifestEntry
from pipeline.spec import Resources, StageConfig, StageSpec
from pipeline.stage import StageContext, StageOutput
from stages.shared.image_data import (
    BUILTIN,
    ConvertConfig,
    open_data_set,
    open_splits,
)

if TYPE_CHECKING:
    from mugs.data.sources.convert import Phase
    from mugs.data.sources.folder import FolderSource
    from mugs.engine.progress import Progress

# Between two updates of the progress.
UPDATE_SECONDS = 0.2


def run(ctx: StageContext, cfg: ConvertConfig) -> StageOutput:
    """Convert the splits on rank 0; outputs `train` and `val` (.beton) and their sidecars.

    A conversion that was stopped goes on from its last part. Other ranks end at once: reading and
    writing one file is not faster on several nodes.
    """
    if os.environ.get("RANK", "0") != "0":
        return StageOutput()
    from mugs.data.sources.base import describe_skipped
    from mugs.data.sources.changes import describe_changes
    from mugs.data.sources.convert import convert_to_beton
    from mugs.data.sources.repeated import StoredContents, describe_repeated, read_contents

    outputs: dict[str, Path] = {}
    notes: list[str] = []
    checksums: dict[str, str] = {}
    contents: dict[str, StoredContents] = {}
    sources = open_splits(ctx.run_dir, cfg)
    images = {split: len(source) for split, source in sources.items()}
    num_classes = len(sources["train"].classes)
    with closing(ConversionProgress(ctx.run_dir / "progress.json", images)) as progress:
        for split in images:
            source = sources.pop(split)
            target = ctx.run_dir / f"{split}.beton"
            sidecar = convert_to_beton(
                source,
                target,
                allow_bad=cfg.allow_bad,
                storage=cfg.storage,
                threads=cfg.threads,
                report=partial(progress.update, split),
                control=ctx.control,
            )
            progress.finish(split)
            outputs |= {split: target, f"{split}_sidecar": target.with_name(target.name + ".json")}
            checksums[split] = sidecar.sha256
            contents[split] = read_contents(sidecar)
            notes += describe_changes(split, sidecar.changes.items())
            if sidecar.skipped:
                notes.append(f"{split}: {describe_skipped(sidecar.skipped)}")
            # Names and sizes of a million images, before those of the next split come.
            del source, sidecar
    notes += describe_repeated(contents)
    info: dict[str, Any] = {
        "dataset": cfg.dataset,
        "num_classes": num_classes,
    }
    if notes:
        info["notes"] = notes
    return StageOutput(outputs=outputs, info=info, checksums=checksums)


class ConversionProgress:
    """Where a conversion is: images of all splits, and the bytes of the checksum after each.

    The time left is that of all phases of all splits.
    """

    def __init__(self, path: Path, images: Mapping[str, int]) -> None:
        self.path = path
        self.images = images
        # Images of the splits that are converted.
        self.before = 0
        self.bytes_per_image = 0.0
        self.seconds_per_image = 0.0
        self.seconds_per_byte = measure_hash_seconds()
        self.phase = ""
        self.current: Progress | None = None
        self.shown_at = 0.0

    def update(self, split: str, phase: "Phase", done: int, total: int, size: int) -> None:
        """Note how far a phase of a split is."""
        now = time.monotonic()
        name = f"{phase} {split}"
        if name == self.phase and done < total and now - self.shown_at < UPDATE_SECONDS:
            return
        self.shown_at = now
        if phase == "convert":
            self._count_images(name, done, total, size)
        else:
            self._count_bytes(name, done, total)

    def _count_images(self, name: str, done: int, total: int, size: int) -> None:
        all_done = self.before + done
        progress = self._open(name, sum(self.images.values()), all_done, "images", "img/s")
        self.bytes_per_image = size / done
        left = self.bytes_per_image * (progress.total - self.before)
        progress.later_s = left * self.seconds_per_byte
        progress.update(all_done, items=all_done - progress.done)
        self.seconds_per_image = 1 / progress.rate if progress.rate else 0.0

    def _count_bytes(self, name: str, done: int, total: int) -> None:
        megabytes = round(done / 1e6)
        progress = self._open(name, round(total / 1e6), megabytes, "MB", "MB/s")
        split = name.split()[-1]
        later = sum(self.images.values()) - self.before - self.images[split]
        each_s = self.seconds_per_image + self.bytes_per_image * self.seconds_per_byte
        progress.later_s = later * each_s
        progress.update(megabytes, items=megabytes - progress.done)
        if progress.rate:
            self.seconds_per_byte = 1e-6 / progress.rate

    def _open(self, name: str, total: int, start: int, unit: str, rate_unit: str) -> "Progress":
        """Return the progress of a phase; the first call of a phase begins it."""
        from mugs.engine.progress import Progress

        if name != self.phase or self.current is None:
            self.close()
            self.phase = name
            self.current = Progress(
                name,
                total,
                unit=unit,
                rate_unit=rate_unit,
                path=self.path,
                # What is done at the first call, perhaps by earlier starts, says nothing of the
                # speed.
                start=start,
                phase=name,
            )
        return self.current

    def finish(self, split: str) -> None:
        """Note that a split is done."""
        self.before += self.images[split]

    def close(self) -> None:
        """Take the bar off the terminal."""
        if self.current is not None:
            self.current.close()


def measure_hash_seconds() -> float:
    """Return the seconds that SHA-256 takes for a byte."""
    block = bytes(4 << 20)
    began = time.perf_counter()
    hashlib.sha256(block)
    return (time.perf_counter() - began) / len(block)


def check_images(cfg: ConvertConfig, inputs: Mapping[str, StageConfig]) -> tuple[str, float]:
    """Return the numbers of images and classes, and the bytes of the images.

    Raises:
        SourceError, ValueError: as in a run, except for images that are damaged inside.
    """
    from mugs.data.sources.base import describe_skipped

    if cfg.train_dir in BUILTIN:
        return "images that come with scikit-learn", 0.0
    sources = open_data_set(cfg)
    check_not_truncated(sources, cfg)
    counts = [f"{len(source):,} {split} images" for split, source in sources.items()]
    size = sum(source.estimate_bytes() for source in sources.values())
    classes = f"{len(sources['train'].classes)} classes"
    skipped = [
        f"; {split}: {describe_skipped(source.skipped)}"
        for split, source in sources.items()
        if source.skipped
    ]
    words = f"{', '.join(counts)} of {classes}, about {size / 1e9:.1f} GB{''.join(skipped)}"
    # One split after the other is unpacked, and removed once it is converted.
    return words, size + max(source.estimate_unpacked_bytes() for source in sources.values())


def check_not_truncated(sources: "Mapping[str, FolderSource]", cfg: ConvertConfig) -> None:
    """Raise SourceError, in one line, that names the truncated images of all splits."""
    from mugs.data.sources.base import SourceError
    from mugs.data.sources.convert import check_whole_images
    from mugs.engine.progress import Progress

    problems = []
    for split, source in sources.items():
        # A bar on a terminal: the first look at the files of ImageNet takes minutes.
        with closing(Progress(f"look at {split} images", len(source), unit="images")) as progress:

            def report(done: int, total: int, progress: Progress = progress) -> None:
                progress.total = total
                # Drawing a bar takes longer than a look at a file.
                if done % 1000 == 0 or done == total:
                    progress.update(done, items=done - progress.done)

            try:
                check_whole_images(
                    source, allow_bad=cfg.allow_bad, threads=cfg.threads, report=report
                )
            except SourceError as error:
                problems.append(str(error).splitlines()[0])
    if problems:
        raise SourceError("; ".join(problems))


def verify_converted_images(entry: ManifestEntry, every: int) -> list[str]:
    """Return what is wrong with every `every`-th converted image, one line each."""
    from mugs.data.sources.convert import verify_beton

    splits = [split for split in ("train", "val") if split in entry.outputs]
    return [line for split in splits for line in verify_beton(entry.output(split), every=every)]


SPEC = StageSpec(
    name="convert",
    config=ConvertConfig,
    entrypoint="stages.convert:run",
    preflight="stages.convert:check_images",
    check="stages.convert:verify_converted_images",
    resources=Resources(gpu=False, cpus_per_rank=16, hours=4.0),
)
