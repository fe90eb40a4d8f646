"""Compile kernels with numba: without the interpreter lock, and once per machine.

Images inside the compiled renderer are transposed planes (3, W, H) uint8. A column is then
contiguous in memory, which is what the first, horizontal pass of a resize runs along.
"""

import hashlib
import os
import stat
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import numba
from numba.core import config


def kernel_cache_dir() -> Path | None:
    """Return this user's folder of compiled kernels, below NUMBA_CACHE_DIR or the user's cache.

    Its name holds a hash of the sources of all kernels. numba itself compares the file of the
    compiled function only: it would keep old code of functions that are called from other files.

    numba runs what lies there. So None is returned for a folder that is not ours alone; then it
    keeps kernels beside their source.
    """
    sources = b"".join(path.read_bytes() for path in sorted(Path(__file__).parent.glob("*.py")))
    root = config.CACHE_DIR or os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    name = f"mugs-kernels-{os.geteuid()}-{hashlib.sha256(sources).hexdigest()[:12]}"
    folder = Path(root).absolute() / name
    return folder if make_own_folder(folder) else None


def make_own_folder(folder: Path) -> bool:
    """Make a folder if it is missing; return whether only this user can write in it."""
    with suppress(OSError):
        folder.parent.mkdir(parents=True, exist_ok=True)
        with suppress(FileExistsError):
            folder.mkdir(mode=0o700)
        found = folder.lstat()
        others_write = found.st_mode & 0o022
        return stat.S_ISDIR(found.st_mode) and found.st_uid == os.geteuid() and not others_write
    return False


KERNEL_CACHE_DIR = str(kernel_cache_dir() or "")


def cached_njit(function: Callable[..., Any]) -> Callable[..., Any]:
    """Compile with `numba.njit`: no interpreter lock, a cache on disk, division as in numpy."""
    # numba takes the folder from a global setting when the decorator runs, so it is set for that
    # moment only. If the folder cannot be written, numba falls back to its own folders.
    before = config.CACHE_DIR
    config.CACHE_DIR = KERNEL_CACHE_DIR
    try:
        kernel: Callable[..., Any] = numba.njit(nogil=True, cache=True, error_model="numpy")(
            function
        )
    finally:
        config.CACHE_DIR = before
    return kernel
