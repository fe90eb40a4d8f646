"""Result rows on disk, one CSV file per run."""

import csv
import hashlib
import io
from collections.abc import Iterator, Sequence
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any

from pipeline.files import write_atomic
from results.checks import check_row
from results.schema import Result, ResultRow

COLUMNS = [field.name for field in fields(ResultRow)]


class RowsError(ValueError):
    """Rows are damaged, or two claim one cell; a line per problem, each naming file and line."""


def write_rows(path: Path, rows: Sequence[ResultRow]) -> None:
    """Write all rows of a run at once."""
    buffer = io.StringIO()
    writer = csv.DictWriter(buffer, COLUMNS, lineterminator="\n")
    writer.writeheader()
    writer.writerows(asdict(row) for row in rows)
    write_atomic(path, buffer.getvalue())


def read_rows(path: Path, sha256: str | None = None) -> list[ResultRow]:
    """Rows of one file. Raises RowsError naming every line that is refused, or the file when its SHA-256 differs."""
    results, problems = read_results(path, sha256=sha256)
    if problems:
        raise RowsError("\n".join(problems))
    return [result.row for result in results]


def read_results(
    path: Path, name: str | None = None, *, sha256: str | None = None
) -> tuple[list[Result], list[str]]:
    """Rows of one file with where they are, and a line for everything refused; `name` is what the file is called.

    `sha256`: what the manifest says of the file; one that differs is refused as a whole.
    """
    name = name or str(path)
    try:
        content = path.read_bytes()
        text = content.decode("utf-8")
    except (OSError, UnicodeDecodeError) as error:
        return [], [f"{name}: cannot be read: {error}"]
    if sha256 is not None and hashlib.sha256(content).hexdigest() != sha256:
        return [], [f"{name}: differs from the SHA-256 in the manifest; run again what made it"]
    reader = csv.DictReader(io.StringIO(text, newline=""), strict=True)
    results, problems = [], []
    try:
        if reader.fieldnames != COLUMNS:
            return [], [f"{name}, line 1: columns {reader.fieldnames}, expected {COLUMNS}"]
        for where, record in _located(reader, name):
            row, problem = parse_row(record)
            if row is None:
                problems.append(f"{where}: {problem}")
            else:
                results.append(Result(row, where))
    except csv.Error as error:
        problems.append(f"{name}, line {reader.reader.line_num}: {error}")
    return results, problems


def _located(reader: "csv.DictReader[str]", name: str) -> Iterator[tuple[str, dict[str, Any]]]:
    for record in reader:
        yield f"{name}, line {reader.line_num}", record


def parse_row(record: dict[str, Any]) -> tuple[ResultRow | None, str | None]:
    """The row of a CSV line, or None and what is wrong with it."""
    if None in record or None in record.values():
        return None, f"expected {len(COLUMNS)} fields"
    try:
        numbers = {
            "epochs": int(record["epochs"]),
            "seed": int(record["seed"]),
            "value": float(record["value"]),
        }
    except ValueError as error:
        return None, str(error)
    row = ResultRow(**record | numbers)
    problem = check_row(row)
    return (None, problem) if problem else (row, None)
