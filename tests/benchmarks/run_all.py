"""Run benchmarks, all or those named (`run_all.py loader knn`),
and merge their rows into build/bench.csv.
"""

import importlib
import sys
from pathlib import Path

COLUMNS = ["name", "ours", "baseline", "ratio", "unit", "note"]
HERE = Path(__file__).resolve().parent
ROOT = HERE.parent.parent
OUT = ROOT / "build" / "bench.csv"
ALL = sorted(
    path.stem.removeprefix("bench_") for path in HERE.glob("bench_*.py") if path.stem != "bench_gpu"
)


def main(names: list[str]) -> None:
    unknown = sorted(set(names) - set(ALL))
    if unknown:
        sys.exit(f"no benchmark {', '.join(unknown)}; there are: {', '.join(ALL)}")
    sys.path[:0] = [str(ROOT), str(HERE), str(HERE.parent), str(HERE.parent / "parity")]
    from table_rows import merge_rows

    for name in names or ALL:
        rows = importlib.import_module(f"bench_{name}").run()
        merge_rows(OUT, COLUMNS, rows)
        for row in rows:
            sys.stdout.write(f"{row['name']:20} {row['ratio']:>8.2f}x  {row['note']}\n")


if __name__ == "__main__":
    main(sys.argv[1:])
