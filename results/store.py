"""Result rows on disk, one CSV file per run, and what makes a row implausible."""

import csv
import difflib
import hashlib
import io
import math
import re
from collections.abc import Iterable, Sequence
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any

from pipeline.files import FormatVersionError, check_format_version, read_bounded, write_atomic
from pipeline.text import clean_line
from results.schema import Result, ResultRow
from results.vocabulary import load_vocabulary

COLUMNS = [field.name for field in fields(ResultRow)]

# Version of the files. Later ones begin with a line "# format_version=N"; those without it are of
# version 1.
FORMAT_VERSION = 1
_VERSION_LINE = re.compile(r"# format_version=(\d+)\s*")

# Columns that may not be empty. `setting` may: an evaluation can have only one.
MOST_EPOCHS = 1_000_000
REQUIRED = ("run_id", "method", "arch", "stage", "dataset", "metric")


class RowsError(ValueError):
    """Rows are damaged, or two claim the same cell; a line per problem, each with file and line."""


def write_rows(path: Path, rows: Sequence[ResultRow]) -> None:
    """Write all rows of a run at once; of a text with a line end, only a space is left of it."""
    buffer = io.StringIO()
    # csv writes \r\n by default, which git and diff show as changes on other systems.
    writer = csv.DictWriter(buffer, COLUMNS, lineterminator="\n")
    writer.writeheader()
    # Not all that a line end could break is quoted: our own reader would refuse the row.
    writer.writerows(
        {
            key: clean_line(value) if isinstance(value, str) else value
            for key, value in asdict(row).items()
        }
        for row in rows
    )
    write_atomic(path, buffer.getvalue())


def read_results(
    path: Path, name: str | None = None, *, sha256: str | None = None
) -> tuple[list[Result], list[str]]:
    """Return the rows of a file with their places, and a line for everything that is refused.

    `name` is what messages call the file. `sha256` is the hash in the manifest; a file with another
    one is refused as a whole.
    """
    name = name or str(path)
    try:
        content = read_bounded(path)
        text = content.decode("utf-8")
    except (OSError, UnicodeDecodeError) as error:
        return [], [f"{name}: cannot be read: {error}"]
    if sha256 is not None and hashlib.sha256(content).hexdigest() != sha256:
        return [], [
            f"{name}: differs from the SHA-256 in the manifest; repeat the run that made it"
        ]

    if stated := _VERSION_LINE.match(text):
        try:
            check_format_version(f"{name}, line 1", int(stated[1]), newest=FORMAT_VERSION)
        except FormatVersionError as error:
            return [], [str(error)]
        text = text[stated.end() :]

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


def check_row(row: ResultRow) -> None:
    """Raise ValueError if a name is missing, or if the value or its unit cannot be right."""
    known = load_vocabulary()
    for name in REQUIRED:
        if not getattr(row, name):
            raise ValueError(f"{name} is empty")
    if not math.isfinite(row.value):
        raise ValueError(f"value {row.value} is not a finite number")
    if row.unit not in known.units:
        raise ValueError(f"unknown unit {row.unit!r}{_hint(row.unit, known.units)}")
    # A metric that no table knows may have any unit; such a row is listed, not refused.
    expected = known.metrics.get(row.metric)
    if expected is not None and row.unit != expected:
        raise ValueError(f"metric {row.metric!r} has the unit {row.unit!r}, expected {expected!r}")
    low, high = known.units[row.unit]
    if not low <= row.value <= high:
        # The usual cause is a fraction that was written as percent, or the reverse.
        raise ValueError(
            f"value {row.value:g} of {row.metric} is outside {low:g} to {high:g} {row.unit}"
        )
    if row.epochs < 0 or row.seed < 0:
        raise ValueError(f"epochs {row.epochs} and seed {row.seed} may not be negative")
    if row.epochs > MOST_EPOCHS:
        raise ValueError(f"epochs may not be more than {MOST_EPOCHS}")


def find_unknown_names(row: ResultRow) -> list[str]:
    """Return the names in a row that no table knows, with the closest known name of each."""
    known = load_vocabulary()
    names = [
        ("data set", row.dataset, known.datasets, known.knows_dataset(row.dataset)),
        ("stage", row.stage, known.stages, row.stage in known.stages),
        ("metric", row.metric, known.metrics, row.metric in known.metrics),
    ]
    return [
        f"{kind} {name!r}{_hint(name, choices)}"
        for kind, name, choices, is_known in names
        if not is_known
    ]


def _hint(name: str, known: Iterable[str]) -> str:
    names = sorted(known)
    guess = difflib.get_close_matches(name, names, n=1)
    return (f"; did you mean {guess[0]!r}?" if guess else "") + f" (known: {', '.join(names)})"
