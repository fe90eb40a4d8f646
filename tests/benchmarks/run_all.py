"""Run benchmarks, all or those named (`run_all.py loader knn`),
and merge their rows into build/bench.csv.
"""

import csv
import importlib
import os
import sys
from pathlib import Path

COLUMNS = ["name", "ours", "baseline", "ratio", "unit", "note"]
HERE = Path(__file__).resolve().parent
ROOT = HERE.parent.parent
OUT = ROOT / "build" / "bench.csv"
ALL = sorted(
    path.stem.removeprefix("bench_") for path in HERE.glob("bench_*.py") if path.stem != "bench_gpu"
)


def known_rows() -> dict[str, dict[str, str]]:
    """The table as it is, by name of row."""
    if not OUT.exists():
        return {}
    with OUT.open(encoding="utf-8", newline="") as stream:
        return {row["name"]: row for row in csv.DictReader(stream)}


def merge(rows: list[dict[str, str]]) -> None:
    """Put rows into the table, in place of older ones of the same name."""
    table = known_rows() | {
        row["name"]: {column: row[column] for column in COLUMNS} for row in rows
    }
    OUT.parent.mkdir(exist_ok=True)
    beside = OUT.with_suffix(".partial")
    with beside.open("w", encoding="utf-8", newline="") as stream:
        writer = csv.DictWriter(stream, COLUMNS)
        writer.writeheader()
        writer.writerows(table.values())
    os.replace(beside, OUT)


def main(names: list[str]) -> None:
    unknown = sorted(set(names) - set(ALL))
    if unknown:
        sys.exit(f"no benchmark {', '.join(unknown)}; there are: {', '.join(ALL)}")
    sys.path[:0] = [str(ROOT), str(HERE), str(HERE.parent / "parity")]
    for name in names or ALL:
        rows = importlib.import_module(f"bench_{name}").run()
        merge(rows)
        for row in rows:
            sys.stdout.write(f"{row['name']:20} {row['ratio']:>8.2f}x  {row['note']}\n")


if __name__ == "__main__":
    main(sys.argv[1:])
