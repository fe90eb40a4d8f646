"""Result rows on disk, one CSV file per run."""

import csv
import hashlib
import io
from collections.abc import Sequence
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any

from pipeline.files import write_atomic
from results.checks import check_row
from results.schema import Result, ResultRow

COLUMNS = [field.name for field in fields(ResultRow)]


class RowsError(ValueError):
    """Rows are damaged, or two claim the same cell; a line per problem, each with file and line."""


def write_rows(path: Path, rows: Sequence[ResultRow]) -> None:
    """Write all rows of a run at once."""
    buffer = io.StringIO()
    # csv writes \r\n by default, which git and diff show as changes on other systems.
    writer = csv.DictWriter(buffer, COLUMNS, lineterminator="\n")
    writer.writeheader()
    writer.writerows(asdict(row) for row in rows)
    write_atomic(path, buffer.getvalue())


def read_rows(path: Path, sha256: str | None = None) -> list[ResultRow]:
    """Return the rows of a file.

    Raises:
        RowsError: a line is refused, or the SHA-256 of the file differs.
    """
    results, problems = read_results(path, sha256=sha256)
    if problems:
        raise RowsError("\n".join(problems))
    return [result.row for result in results]


def read_results(
    path: Path, name: str | None = None, *, sha256: str | None = None
) -> tuple[list[Result], list[str]]:
    """Return the rows of a file with their places, and a line for everything that is refused.

    `name` is what messages call the file. `sha256` is the hash in the manifest; a file with another
    one is refused as a whole.
    """
    name = name or str(path)
    try:
        content = path.read_bytes()
        text = content.decode("utf-8")
    except (OSError, UnicodeDecodeError) as error:
        return [], [f"{name}: cannot be read: {error}"]
    if sha256 is not None and hashlib.sha256(content).hexdigest() != sha256:
        return [], [
            f"{name}: differs from the SHA-256 in the manifest; repeat the run that made it"
        ]

    # newline="" leaves line ends to the csv module, as its documentation asks for.
    reader = csv.DictReader(io.StringIO(text, newline=""), strict=True)
    results, problems = [], []
    try:
        if reader.fieldnames != COLUMNS:
            return [], [f"{name}, line 1: columns {reader.fieldnames}, expected {COLUMNS}"]
        for record in reader:
            # The reader's own count: a quoted field may span lines.
            where = f"{name}, line {reader.line_num}"
            try:
                results.append(Result(parse_row(record), where))
            except ValueError as error:
                problems.append(f"{where}: {error}")
    except csv.Error as error:
        problems.append(f"{name}, line {reader.reader.line_num}: {error}")
    return results, problems


def parse_row(record: dict[str, Any]) -> ResultRow:
    """Return the row of a CSV line.

    Raises:
        ValueError: a field is missing, is not a number, or holds a value that cannot be right.
    """
    # DictReader puts surplus fields under the key None, and fills missing ones with the value None.
    if None in record or None in record.values():
        raise ValueError(f"expected {len(COLUMNS)} fields")
    numbers = {
        "epochs": int(record["epochs"]),
        "seed": int(record["seed"]),
        "value": float(record["value"]),
    }
    row = ResultRow(**record | numbers)
    check_row(row)
    return row
