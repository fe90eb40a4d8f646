"""Images in parquet files as the Hub has them: columns `image` {bytes, path} and `label`.

Their rows are shuffled and compressed, so an image cannot be read without those around it. A
conversion therefore first writes the images of each file into one file beside its own.
"""

from collections.abc import Iterator
from importlib import import_module
from pathlib import Path
from typing import Any, NamedTuple

from mugs.data.sources.base import SourceError
from pipeline.files import make_folder, replace_atomically

# Rows in memory at once: 64 images of ImageNet are 7 MB.
ROWS = 64
COLUMNS = "columns `image` (with `bytes` and `path`) and `label` (whole numbers)"


class Row(NamedTuple):
    """An image; `name` is "" if the file does not tell."""

    name: str
    label: int
    data: bytes


def iter_rows(path: Path) -> Iterator[Row]:
    """Yield the rows of a parquet file.

    Raises SourceError if it cannot be read, has other columns, or a row lacks its image or label.
    """
    try:
        # By name, as it has no types.
        pyarrow: Any = import_module("pyarrow")
        parquet: Any = import_module("pyarrow.parquet")
    except ImportError as error:
        raise SourceError(
            f"{path}: reading parquet files needs pyarrow (pip install 'mugs-repro[parquet]')"
        ) from error

    number = 0
    try:
        with parquet.ParquetFile(path) as file:
            _check_columns(path, pyarrow, file.schema_arrow)
            for batch in file.iter_batches(ROWS, columns=["image", "label"]):
                for image, label in zip(
                    batch.column("image").to_pylist(),
                    batch.column("label").to_pylist(),
                    strict=True,
                ):
                    if not image or not image["bytes"]:
                        raise SourceError(f"{path}: row {number} has no image")
                    if label is None or label < 0:
                        raise SourceError(f"{path}: row {number} ({image['path']}) has no label")
                    yield Row(Path(image["path"] or "").name, label, image["bytes"])
                    number += 1
    except (pyarrow.ArrowException, OSError) as error:
        raise SourceError(
            f"{path}: not a readable parquet file ({error}); it was cut short, fetch it again"
        ) from error


def _check_columns(path: Path, pyarrow: Any, schema: Any) -> None:
    """Raise SourceError if the columns are others than an image and a label."""
    types = {name: schema.field(name).type for name in schema.names}
    image = types.get("image")
    fields = (
        {image.field(index).name for index in range(image.num_fields)}
        if image is not None and pyarrow.types.is_struct(image)
        else set()
    )
    if not {"bytes", "path"} <= fields or not pyarrow.types.is_integer(types.get("label")):
        raise SourceError(f"{path}: its columns are {', '.join(schema.names)}; expected {COLUMNS}")


def unpack_parquet(path: Path, target: Path, size: int) -> None:
    """Write the images of a file one after another, `size` bytes, unless that is done already.

    Raises SourceError if they have another size than before.
    """
    if target.is_file() and target.stat().st_size == size:
        return
    make_folder(target.parent)
    with replace_atomically(target) as temporary:
        with temporary.open("wb") as stream:
            for row in iter_rows(path):
                stream.write(row.data)
            written = stream.tell()
        if written != size:
            raise SourceError(f"{path}: holds {written:,} bytes of images, {size:,} a moment ago")


def read_row(path: Path, number: int) -> bytes:
    """Return one image. Slow: all rows before it are read."""
    for index, row in enumerate(iter_rows(path)):
        if index == number:
            return row.data
    raise SourceError(f"{path}: has no row {number}")
