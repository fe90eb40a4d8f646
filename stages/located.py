"""Where a checked data set lies: written by the stage that checks it, read by those that use it."""

import json
from collections.abc import Callable
from pathlib import Path

from pipeline.spec import StageContext


def locate(
    ctx: StageContext, data_dir: str | None, kind: str, materialize: Callable[[Path], None]
) -> tuple[Path, dict[str, Path]]:
    """The folder of the data set; for "builtin:digit_<kind>" it is written by `materialize` and an output of the run.

    Raises ValueError where `data_dir` is None.
    """
    if data_dir is None:
        raise ValueError("data_dir is not set")
    if own := folder(data_dir, kind):
        return own, {}
    root = ctx.run_dir / kind
    materialize(root)
    return root, {kind: root}


def folder(data_dir: str | None, kind: str) -> Path | None:
    """The user's folder; None where it is not set, or "builtin:digit_<kind>", which a run writes for itself."""
    if data_dir is None or data_dir == f"builtin:digit_{kind}":
        return None
    return Path(data_dir).expanduser().absolute()


def write_root(run_dir: Path, root: Path) -> Path:
    """`layout.json` of a run, naming the folder of the data set."""
    from mugs.atomic import write_text_atomic

    path = run_dir / "layout.json"
    write_text_atomic(path, json.dumps({"root": str(root)}, indent=1))
    return path


def read_root(ctx: StageContext) -> Path:
    """The folder of the data set that fills the role data."""
    return Path(json.loads(ctx.inputs["data"].output("layout").read_text(encoding="utf-8"))["root"])
