"""Converting the same images out of class folders, and out of tar and parquet files."""

import gc
import io
import shutil
import statistics
import tarfile
import tempfile
from collections.abc import Callable, Iterator
from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np
from bench_step import seconds
from PIL import Image

from mugs.data.sources.convert import convert_to_beton
from mugs.data.sources.folder import FolderSource
from mugs.data.sources.packed import open_packed

COUNTS = {2_000: 7, 20_000: 3}
"""Images, and how often each conversion is measured."""
CLASSES, DISTINCT, THREADS = 20, 200, 4
SHARD = 1_000


def draw_images(count: int) -> Iterator[tuple[str, bytes]]:
    """Yield `class/name` and JPEG files of some 10 kB, of which `DISTINCT` differ."""
    rng = np.random.default_rng(0)
    files = []
    for _ in range(DISTINCT):
        small = Image.fromarray(rng.integers(0, 255, (24, 32, 3), dtype=np.uint8))
        pixels = np.asarray(small.resize((160, 120), Image.Resampling.BICUBIC)).astype(np.int16)
        grain = rng.normal(0, 8, (120, 160, 1)).astype(np.int16)
        stream = io.BytesIO()
        image = Image.fromarray((pixels + grain).clip(0, 255).astype(np.uint8))
        image.save(stream, format="JPEG", quality=85)
        files.append(stream.getvalue())
    for index in range(count):
        label = index * CLASSES // count
        yield f"n{label:08d}/n{label:08d}_{index}.JPEG", files[index % DISTINCT]


def write_all(folder: Path, count: int) -> dict[str, Path]:
    """Write the images in each way; return the paths to convert."""
    images = list(draw_images(count))
    for name, data in images:
        path = folder / "folders" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data)
    write_tar(folder / "plain.tar", images)
    inner = folder / "inner.tar"
    with tarfile.open(folder / "imagenet.tar", "w") as outer:
        for start in range(0, count, count // CLASSES):
            members = images[start : start + count // CLASSES]
            write_tar(inner, [(name.partition("/")[2], data) for name, data in members])
            outer.add(inner, arcname=f"{members[0][0].partition('/')[0]}.tar")
    inner.unlink()
    (folder / "shards").mkdir()
    for start in range(0, count, SHARD):
        members = []
        for name, data in images[start : start + SHARD]:
            key = name.partition("/")[2].removesuffix(".JPEG")
            members += [(f"{key}.jpg", data), (f"{key}.cls", name[1:9].encode())]
        write_tar(folder / f"shards/x-{start // SHARD:06d}.tar", members)
    write_parquet(folder / "hub.parquet", images)
    return {
        "folders": folder / "folders",
        "tar": folder / "plain.tar",
        "tar_of_tars": folder / "imagenet.tar",
        "webdataset": folder / "shards",
        "parquet": folder / "hub.parquet",
    }


def write_tar(path: Path, members: list[tuple[str, bytes]]) -> None:
    """Write a tar file."""
    with tarfile.open(path, "w") as tar:
        for name, data in members:
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))


def write_parquet(path: Path, images: list[tuple[str, bytes]]) -> None:
    """Write a parquet file with the columns of the Hub."""
    pyarrow: Any = import_module("pyarrow")
    parquet: Any = import_module("pyarrow.parquet")
    columns = {
        "image": [{"bytes": data, "path": name.partition("/")[2]} for name, data in images],
        "label": [int(name[1:9]) for name, _ in images],
    }
    parquet.write_table(pyarrow.table(columns), path, row_group_size=100)


def convert(path: Path, target: Path) -> None:
    """List and convert images, as the first start of a run does."""
    source = FolderSource(path) if path.name == "folders" else open_packed(path, None, None)
    convert_to_beton(source, target / "x.beton", threads=THREADS)


def measure(work: Callable[[Path], None], folder: Path) -> float:
    """Return the seconds of a conversion into an empty folder."""
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    gc.collect()
    return seconds(lambda: work(folder))


def run() -> list[dict[str, Any]]:
    """Rows {name, ours, baseline, ratio, unit, note}; the baseline are class folders."""
    found = []
    for count, rounds in COUNTS.items():
        with tempfile.TemporaryDirectory() as name:
            ways = write_all(Path(name), count)
            out = Path(name) / "out"
            taken: dict[str, list[float]] = {way: [] for way in ways}
            # The first round fills the cache of files.
            for _ in range(rounds + 1):
                for way, path in ways.items():
                    taken[way].append(measure(lambda folder, path=path: convert(path, folder), out))
            for way in list(ways)[1:]:
                pairs = list(zip(taken[way], taken["folders"], strict=True))[1:]
                found.append(
                    {
                        "name": f"convert_{way}_{count}",
                        "ours": statistics.median(ours for ours, _ in pairs),
                        "baseline": statistics.median(folders for _, folders in pairs),
                        "ratio": statistics.median(folders / ours for ours, folders in pairs),
                        "unit": "s",
                        "note": f"{count:,} images of 10 kB, baseline: class folders; "
                        f"median of {rounds} pairs, listing included",
                    }
                )
    return found
