"""numba without the interpreter lock, compiled once per machine.

Images inside the compiled renderer are transposed planes (3, W, H) uint8: columns are contiguous, which is what the
first, horizontal pass of a resize runs along.
"""

import hashlib
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numba
from numba.core import config


def kernel_cache_dir() -> Path:
    """Folder of the kernels, named by the sources of all of them, under NUMBA_CACHE_DIR or the user's cache.

    numba compares the file of the function alone: a kernel would go on with old code of callees in other files.
    """
    sources = b"".join(path.read_bytes() for path in sorted(Path(__file__).parent.glob("*.py")))
    root = config.CACHE_DIR or os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(root) / f"mugs-kernels-{hashlib.sha256(sources).hexdigest()[:12]}"


KERNEL_CACHE_DIR = str(kernel_cache_dir())


def cached_njit(function: Callable[..., Any]) -> Callable[..., Any]:
    """`numba.njit` that releases the lock, caches on disk and divides like numpy."""
    before = config.CACHE_DIR
    config.CACHE_DIR = (
        KERNEL_CACHE_DIR  # numba falls back to its own folders where this cannot be written
    )
    try:
        kernel: Callable[..., Any] = numba.njit(nogil=True, cache=True, error_model="numpy")(
            function
        )
    finally:
        config.CACHE_DIR = before
    return kernel
