"""Run every benchmark, print its ratios and merge them into build/bench.csv."""

import csv
import importlib
import sys
from pathlib import Path

COLUMNS = ["name", "ours", "baseline", "ratio", "unit", "note"]
HERE = Path(__file__).resolve().parent
ROOT = HERE.parent.parent


def main() -> None:
    sys.path[:0] = [str(ROOT), str(HERE), str(HERE.parent / "parity")]
    out = ROOT / "build" / "bench.csv"
    known = {}
    if out.exists():
        with out.open(encoding="utf-8", newline="") as stream:
            known = {row["name"]: row for row in csv.DictReader(stream)}
    for path in sorted(set(HERE.glob("bench_*.py")) - {HERE / "bench_gpu.py"}):
        for row in importlib.import_module(path.stem).run():
            known[row["name"]] = {column: row[column] for column in COLUMNS}
            sys.stdout.write(f"{row['name']:20} {row['ratio']:>8.2f}x  {row['note']}\n")
    out.parent.mkdir(exist_ok=True)
    with out.open("w", encoding="utf-8", newline="") as stream:
        writer = csv.DictWriter(stream, COLUMNS)
        writer.writeheader()
        writer.writerows(known.values())


if __name__ == "__main__":
    main()
