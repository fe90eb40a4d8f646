"""Free-space checks, and retries while a disk is full or failing."""

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
    """Return a size for people: 1234567890 -> 1.23 GB."""
    for unit, scale in (("GB", 1e9), ("MB", 1e6)):
        if size >= scale:
            return f"{size / scale:.2f} {unit}"
    return f"{size} bytes"


def check_free_space(folder: Path, needed: int, purpose: str) -> None:
    """Raise OSError (ENOSPC, EDQUOT) with both sizes unless `needed` bytes are free.

    If the file system can, the bytes are also reserved for a moment: only that reveals a quota.
    """
    if needed <= 0:
        return
    stat = os.statvfs(folder)
    # f_bavail, not f_bfree: blocks that are kept for root are of no use here.
    free = stat.f_bavail * stat.f_frsize
    lack = f"{format_bytes(free)} free, {format_bytes(needed)} needed for {purpose}"
    if free < needed:
        raise OSError(errno.ENOSPC, f"not enough room: {lack}", str(folder))
    # statvfs does not know quotas. A reservation fails where the write would.
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
    """Allocate `size` bytes of an open file; return 0 or the error number.

    It is EOPNOTSUPP if the file system cannot. os.posix_fallocate would then write to every block.
    """
    # Linux has it, macOS does not.
    try:
        fallocate = ctypes.CDLL(None, use_errno=True).fallocate
    except AttributeError:
        return errno.EOPNOTSUPP
    # Without the types ctypes would cut sizes to 32 bits.
    fallocate.argtypes = [ctypes.c_int, ctypes.c_int, ctypes.c_int64, ctypes.c_int64]
    return 0 if fallocate(descriptor, 0, 0, size) == 0 else ctypes.get_errno()


def retry_disk_errors(
    work: Callable[[], _Result], what: str, *, seconds: float, stop: Event, first_pause: float = 1.0
) -> _Result:
    """Call `work` again, at growing intervals, while the disk is full or failing.

    Retried are ENOSPC, EDQUOT, EIO and ESTALE.

    Raises:
        CheckpointError: `seconds` are over, `stop` is set, or it is another OSError. The message
            says what failed and why.
    """
    end = time.monotonic() + seconds
    pause = first_pause
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
            # The last pause is cut, so that the last attempt comes when the time is over.
            left = end - time.monotonic()
            if left <= 0 or stop.is_set():
                tried = f" (tried for {seconds:.0f} s)" if seconds > 0 else ""
                raise CheckpointError(reason + tried) from error
            pause = min(pause, left)
            logger.warning("%s; again in %.0f s", reason, pause)
            # An event, not a sleep: closing the writer must not wait out the pause.
            stop.wait(pause)
            pause = min(2 * pause, _LONGEST_PAUSE_S)
