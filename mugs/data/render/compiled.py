"""numba without the interpreter lock, compiled once per machine.

Images inside the compiled renderer are transposed planes (3, W, H) uint8: columns are contiguous, which is what the
first, horizontal pass of a resize runs along.
"""

from collections.abc import Callable
from typing import Any

import numba


def compiled(function: Callable[..., Any]) -> Callable[..., Any]:
    """`numba.njit` that releases the lock, caches on disk and divides like numpy."""
    kernel: Callable[..., Any] = numba.njit(nogil=True, cache=True, error_model="numpy")(function)
    return kernel
