"""Write a data set of the demo once, and all of it or nothing."""

from collections.abc import Callable
from functools import wraps
from pathlib import Path
from typing import Concatenate, ParamSpec

from pipeline.files import replace_atomically

P = ParamSpec("P")


def write_once(
    write: Callable[Concatenate[Path, P], None],
) -> Callable[Concatenate[Path, P], None]:
    """Call `write` on a temporary folder that takes its name at the end, if it is not there yet."""

    @wraps(write)
    def materialize(root: Path, /, *args: P.args, **kwargs: P.kwargs) -> None:
        if not root.is_dir():
            with replace_atomically(root) as folder:
                write(folder, *args, **kwargs)

    return materialize
