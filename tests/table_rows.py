"""Tables in build/ that every run of the benchmarks or campaigns adds to."""

import csv
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any


def merge_rows(table: Path, columns: Sequence[str], rows: Iterable[Mapping[str, Any]]) -> None:
    """Put rows into a CSV file, in place of those of the same name; it is sorted by name."""
    known: dict[str, Mapping[str, Any]] = {}
    if table.exists():
        with table.open(encoding="utf-8", newline="") as stream:
            known = {row["name"]: row for row in csv.DictReader(stream)}
    known |= {row["name"]: {column: row[column] for column in columns} for row in rows}
    table.parent.mkdir(exist_ok=True)
    # Beside it and renamed: whoever stops a long run must not lose the rows of earlier ones.
    beside = table.with_suffix(".partial")
    with beside.open("w", encoding="utf-8", newline="") as stream:
        writer = csv.DictWriter(stream, columns)
        writer.writeheader()
        writer.writerows(known[name] for name in sorted(known))
    beside.replace(table)
