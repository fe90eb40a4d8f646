"""Room on the disk, and patience with a disk that has none or stumbles."""

import ctypes
import errno
import logging
import os
import time
import uuid
from collections.abc import Callable
from pathlib import Path
from threading import Event
from typing import TypeVar

from mugs.checkpoint.record import CheckpointError

logger = logging.getLogger(__name__)
TRANSIENT_ERRORS = {errno.ENOSPC, errno.EDQUOT, errno.EIO, errno.ESTALE}
_LONGEST_PAUSE_S = 60.0
_Result = TypeVar("_Result")


def format_bytes(size: int) -> str:
    """Bytes for people: 1234567890 -> 1.23 GB."""
    for unit, scale in (("GB", 1e9), ("MB", 1e6)):
        if size >= scale:
            return f"{size / scale:.2f} {unit}"
    return f"{size} bytes"


def check_free_space(folder: Path, needed: int, purpose: str) -> None:
    """Raise OSError (ENOSPC, EDQUOT) saying where, how much there is and how much is needed, unless that fits.

    Free space is asked for, and where the file system can, the bytes are reserved for a moment: a quota shows only so.
    """
    if needed <= 0:
        return
    stat = os.statvfs(folder)
    free = stat.f_bavail * stat.f_frsize
    lack = f"{format_bytes(free)} free, {format_bytes(needed)} needed for {purpose}"
    if free < needed:
        raise OSError(errno.ENOSPC, f"not enough room: {lack}", str(folder))
    probe = folder / f".room.{uuid.uuid4().hex[:8]}.tmp"
    descriptor = os.open(probe, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    try:
        code = reserve_space(descriptor, needed)
    finally:
        os.close(descriptor)
        os.unlink(probe)
    if code in (errno.ENOSPC, errno.EDQUOT):
        raise OSError(code, f"{os.strerror(code)} (a quota?): {lack}", str(folder))


def reserve_space(descriptor: int, size: int) -> int:
    """Allocate `size` bytes of an open file; 0, or the error number (EOPNOTSUPP where the file system cannot).

    Not os.posix_fallocate, which writes to every block where the file system cannot.
    """
    try:
        fallocate = ctypes.CDLL(None, use_errno=True).fallocate
    except AttributeError:
        return errno.EOPNOTSUPP
    fallocate.argtypes = [ctypes.c_int, ctypes.c_int, ctypes.c_int64, ctypes.c_int64]
    return 0 if fallocate(descriptor, 0, 0, size) == 0 else ctypes.get_errno()


def retry_disk_errors(
    work: Callable[[], _Result], what: str, *, seconds: float, stop: Event, first_pause: float = 1.0
) -> _Result:
    """Call `work` again while the disk is full or stumbles (ENOSPC, EDQUOT, EIO, ESTALE), at growing intervals.

    Raises CheckpointError, saying what failed and why, after `seconds`, at once for any other OSError, and when
    `stop` is set.
    """
    end, pause = time.monotonic() + seconds, first_pause
    while True:
        try:
            return work()
        except OSError as error:
            reason = (
                f"{what} failed: {error.filename}: {error.strerror}"
                if error.filename
                else f"{what}: {error}"
            )
            if error.errno not in TRANSIENT_ERRORS:
                raise CheckpointError(reason) from error
            left = end - time.monotonic()
            if left <= 0 or stop.is_set():
                tried = f" (tried for {seconds:.0f} s)" if seconds > 0 else ""
                raise CheckpointError(reason + tried) from error
            pause = min(pause, left)
            logger.warning("%s; again in %.0f s", reason, pause)
            stop.wait(pause)
            pause = min(2 * pause, _LONGEST_PAUSE_S)
