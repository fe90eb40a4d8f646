"""The campaigns of faults at full size, merged into build/chaos.csv.

Every file `campaign_*.py` here is a campaign: NAME is its row, `run()` makes it and returns an
Outcome. Names, or parts of them, on the command line choose some: `python tests/faults/chaos.py 2_
malicious`.
"""

import importlib
import sys
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent.parent
COLUMNS = ["name", "trials", "failures", "note"]


def campaigns(chosen: Iterable[str] = ()) -> list[Any]:
    """Modules of the campaigns in the order of their names;
    those whose name contains one of the given texts.
    """
    chosen = list(chosen)
    modules = [importlib.import_module(path.stem) for path in HERE.glob("campaign_*.py")]
    wanted = [m for m in modules if not chosen or any(text in m.NAME for text in chosen)]
    return sorted(wanted, key=lambda module: str(module.NAME))


def main(chosen: list[str]) -> int:
    """Run them, say how each went; 1 when a trial failed, 2 when no campaign is called so."""
    sys.path[:0] = [str(ROOT), str(HERE.parent), str(HERE)]
    from table_rows import merge_rows

    found = campaigns(chosen)
    if not found:
        sys.stderr.write(f"no campaign is called {' or '.join(chosen)}\n")
        return 2
    failures = 0
    for module in found:
        began = time.monotonic()
        outcome = module.run()
        row = outcome.row()
        merge_rows(ROOT / "build" / "chaos.csv", COLUMNS, [row])
        failures += len(outcome.complaints)
        took = time.monotonic() - began
        sys.stdout.write(
            f"{row['name']:24} {row['trials']:>7} trials {row['failures']:>5} failures  "
            f"{took:.0f} s\n"
        )
        for complaint in outcome.complaints[:10]:
            sys.stdout.write(f"    {complaint}\n")
    return 1 if failures else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
