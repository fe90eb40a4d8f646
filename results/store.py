"""Result rows on disk, one CSV file per run."""

import csv
import io
import os
import uuid
from collections.abc import Sequence
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any

from results.schema import ResultRow

COLUMNS = [field.name for field in fields(ResultRow)]


class RowsError(ValueError):
    """A file of rows is damaged; the message names file and line."""


def write_rows(path: Path, rows: Sequence[ResultRow]) -> None:
    """Write all rows of a run at once, beside and renamed."""
    buffer = io.StringIO()
    writer = csv.DictWriter(buffer, COLUMNS, lineterminator="\n")
    writer.writeheader()
    writer.writerows(asdict(row) for row in rows)
    temporary = path.with_name(f".{path.name}.{uuid.uuid4().hex[:8]}.tmp")
    with temporary.open("w", encoding="utf-8") as stream:
        stream.write(buffer.getvalue())
        stream.flush()
        os.fsync(stream.fileno())
    os.replace(temporary, path)


def read_rows(path: Path) -> list[ResultRow]:
    """Rows of one file. Raises RowsError naming the line."""
    rows = []
    with path.open(encoding="utf-8", newline="") as stream:
        reader = csv.DictReader(stream)
        if reader.fieldnames != COLUMNS:
            raise RowsError(f"{path}: columns {reader.fieldnames}, expected {COLUMNS}")
        record: dict[str, Any]
        for line, record in enumerate(reader, 2):
            try:
                record |= {
                    "epochs": int(record["epochs"]),
                    "seed": int(record["seed"]),
                    "value": float(record["value"]),
                }
            except (TypeError, ValueError) as error:
                raise RowsError(f"{path}, line {line}: {error}") from error
            rows.append(ResultRow(**record))
    return rows
