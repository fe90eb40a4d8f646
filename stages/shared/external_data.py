"""Data sets that stay where they lie: checked by the stage that finds them, read from there by those that use them."""

import json
from collections.abc import Callable
from contextlib import closing
from pathlib import Path

from pipeline.stage import StageContext

Report = Callable[[int, int], None]
Check = Callable[[Path, Report], dict[str, int]]
"""Raises SourceError naming what is wrong below a folder, else says how many there are of what; tells (done, total)."""


def check_external_data(data_dir: str | None, kind: str, check: Check) -> tuple[str, float]:
    """What is there, in words, and 0 bytes that will be written. Raises what `check` raises."""
    root = find_data_folder(data_dir, kind)
    if root is None:
        return f"{kind} of the digits that come with scikit-learn", 0.0
    counts = check(root, lambda done, total: None)
    return ", ".join(f"{count:,} {what}" for what, count in counts.items()), 0.0


def register_external_data(
    ctx: StageContext,
    data_dir: str | None,
    kind: str,
    materialize: Callable[[Path], None],
    check: Check,
) -> tuple[dict[str, Path], dict[str, int]]:
    """Outputs and counts of a data set: `layout` says where it lies; "builtin:digit_<kind>" is written and an output.

    Raises what `check` raises.
    """
    from mugs.engine.progress import Progress
    from pipeline.files import write_atomic

    outputs = {"layout": ctx.run_dir / "layout.json"}
    root = find_data_folder(data_dir, kind)
    if root is None:
        root = outputs[kind] = ctx.run_dir / kind
        materialize(root)
    progress = Progress("check", 1, unit=kind, path=ctx.run_dir / "progress.json")

    def report(done: int, total: int) -> None:
        progress.total = total
        progress.update(done)

    with closing(progress):
        counts = check(root, report)
    write_atomic(outputs["layout"], json.dumps({"root": str(root)}, indent=1))
    return outputs, counts


def find_data_folder(data_dir: str | None, kind: str) -> Path | None:
    """The user's folder; None for "builtin:digit_<kind>", which a run writes for itself. Raises ValueError for None."""
    if data_dir is None:
        raise ValueError("data_dir is not set")
    return None if data_dir == f"builtin:digit_{kind}" else Path(data_dir).expanduser().absolute()


def read_data_root(ctx: StageContext) -> Path:
    """The folder of the data set that fills the role data."""
    return Path(json.loads(ctx.inputs["data"].output("layout").read_text(encoding="utf-8"))["root"])
