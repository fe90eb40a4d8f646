"""File calls of which a share fails, as with a file server that stumbles."""

import builtins
import errno
import io
import os
import random
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any
from unittest.mock import patch

CODES = (errno.EIO, errno.ESTALE)
# Calls with a path, and calls with the descriptor of an opened file.
OF_PATHS = (
    "open", "stat", "lstat", "scandir", "listdir", "mkdir", "rename", "replace", "unlink", "rmdir",
    "link", "readlink", "utime", "chmod", "remove",
)  # fmt: skip
OF_FILES = ("write", "fsync", "pread", "fstat")


class Stumbles:
    """Which calls below a folder fail; `count` is how many did."""

    def __init__(self, folder: Path, rng: random.Random, share: float) -> None:
        self.folder, self.rng, self.share = str(folder), rng, share
        self.count = 0
        self.opened: set[int] = set()

    def meet(self, path: Any, *, relative: bool = False) -> None:
        """Fail perhaps. `relative`: the path is that of an entry of an opened folder."""
        text = os.fsdecode(path) if isinstance(path, str | bytes | os.PathLike) else ""
        concerned = text.startswith(self.folder) or (relative and not text.startswith("/"))
        if isinstance(path, int):
            concerned = path in self.opened
        if concerned and self.rng.random() < self.share:
            self.count += 1
            code = self.rng.choice(CODES)
            raise OSError(code, os.strerror(code), text or None)


@contextmanager
def stumbling(folder: Path, rng: random.Random, share: float = 0.03) -> Iterator[Stumbles]:
    """Within the block, this share of the file calls below a folder fails."""
    stumbles = Stumbles(folder, rng, share)
    real_open = io.open

    def wrap_path(real: Callable[..., Any]) -> Callable[..., Any]:
        def call(path: Any = ".", *args: Any, **kwargs: Any) -> Any:
            relative = any(key.endswith("dir_fd") for key in kwargs)
            stumbles.meet(path, relative=relative)
            found = real(path, *args, **kwargs)
            if real.__name__ == "open" and (relative or str(path).startswith(stumbles.folder)):
                stumbles.opened.add(found)
            return found

        return call

    def wrap_file(real: Callable[..., Any]) -> Callable[..., Any]:
        def call(descriptor: Any, *args: Any, **kwargs: Any) -> Any:
            stumbles.meet(descriptor)
            return real(descriptor, *args, **kwargs)

        return call

    def open_file(file: Any, *args: Any, **kwargs: Any) -> Any:
        if not isinstance(file, int):
            stumbles.meet(file)
        return real_open(file, *args, **kwargs)

    wrapped = {name: wrap_path(getattr(os, name)) for name in OF_PATHS}
    wrapped |= {name: wrap_file(getattr(os, name)) for name in OF_FILES}
    # shutil.rmtree and others ask whether a function takes descriptors.
    able = {
        kind: getattr(os, kind)
        | {new for name, new in wrapped.items() if getattr(os, name) in getattr(os, kind)}
        for kind in ("supports_dir_fd", "supports_fd", "supports_follow_symlinks")
    }
    with ExitStack() as stack:
        stack.enter_context(patch.multiple(os, **wrapped, **able))
        stack.enter_context(patch.object(io, "open", open_file))
        stack.enter_context(patch.object(builtins, "open", open_file))
        yield stumbles
