"""Where a checked data set lies: written by the stage that checks it, read by those that use it."""

import json
from pathlib import Path

from pipeline.spec import StageContext


def write_root(run_dir: Path, root: Path) -> Path:
    """`layout.json` of a run, naming the folder of the data set."""
    from mugs.atomic import write_text_atomic

    path = run_dir / "layout.json"
    write_text_atomic(path, json.dumps({"root": str(root)}, indent=1))
    return path


def read_root(ctx: StageContext) -> Path:
    """The folder of the data set that fills the role data."""
    return Path(json.loads(ctx.inputs["data"].output("layout").read_text(encoding="utf-8"))["root"])
