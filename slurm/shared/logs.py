"""Log files of a run: one per attempt and rank, beside the output of processes without one."""

import logging
import os
import stat
import sys
from pathlib import Path
from typing import BinaryIO, TextIO

from pipeline.files import open_regular_file, open_to_append

FILE_ONLY = "file_only"  # attribute of a log record that goes to the file, not to the screen
MOST_BYTES = 16 << 20  # of a log, far more than the lines that anybody asks for
_TAIL_BYTES = 8192


def log_path(run_dir: Path, attempt: int, rank: int) -> Path:
    """Return the log file of one rank in one attempt."""
    return run_dir / "logs" / f"attempt_{attempt:04d}_rank{rank}.log"


def rank_output_path(run_dir: Path, rank: int) -> Path:
    """Return the file for what a rank on this machine prints before it has a log."""
    return run_dir / "logs" / f"rank{rank}.err"


def find_rank_log(run_dir: Path, attempt: int, rank: int) -> Path:
    """Return the log of a rank; if it ended before it had one, the file with what it printed."""
    log = log_path(run_dir, attempt, rank)
    printed = rank_output_path(run_dir, rank)
    says_more = not log.exists() and printed.exists() and printed.stat().st_size > 0
    return printed if says_more else log


class _LogFile(logging.FileHandler):
    """A log that is written nowhere else: a link in its place is refused."""

    def _open(self) -> TextIO:  # type: ignore[override]
        return open_to_append(Path(self.baseFilename))


def start_logging(path: Path, *, screen: bool) -> None:
    """Send log records to the file and, except for those with FILE_ONLY, to the screen."""
    path.parent.mkdir(parents=True, exist_ok=True)
    handlers: list[logging.Handler] = [_LogFile(path, encoding="utf-8")]
    if screen:
        shown = logging.StreamHandler(sys.stdout)
        shown.addFilter(lambda record: not hasattr(record, FILE_ONLY))
        handlers.append(shown)
    logging.basicConfig(
        format="%(asctime)s %(levelname)s %(name)s: %(message)s",
        handlers=handlers,
        level=os.environ.get("MUGS_LOG_LEVEL", "INFO").upper(),
        force=True,  # replace the handlers of an earlier call
    )
    logging.captureWarnings(True)


def find_newest_log(run_dir: Path, pattern: str = "*") -> str | None:
    """Return the log that says most about the last attempt, of those that are not empty.

    Links, pipes and folders of such a name are no logs.
    """
    best: tuple[bool, bool, float] | None = None
    newest = None
    for path in (run_dir / "logs").glob(pattern):
        try:
            found = path.lstat()
        except OSError:
            continue  # removed meanwhile
        is_log = path.suffix in (".log", ".err", ".out") and stat.S_ISREG(found.st_mode)
        if not is_log or not found.st_size:
            continue
        # The log of an attempt says most. Of the raw output of processes, standard error says more.
        importance = path.name.startswith("attempt_"), path.suffix == ".err", found.st_mtime
        if best is None or importance > best:
            best = importance
            newest = path
    return str(newest) if newest else None


def read_last_line(log: str | None) -> str:
    """Return the last line that is not blank; nothing if there is no log, or it cannot be read."""
    try:
        lines = read_tail(Path(log), _TAIL_BYTES) if log else []
    except OSError:
        return ""
    return next((line.strip() for line in reversed(lines) if line.strip()), "")


def read_tail(path: Path, size: int) -> list[str]:
    """Return the lines in the last `size` bytes of a log, the first of them perhaps in part.

    Raises:
        OSError: it cannot be read, or is no regular file.
    """
    with open_log(path) as file:
        file.seek(max(0, os.fstat(file.fileno()).st_size - size))  # logs can have many MB
        return file.read(size).decode(errors="replace").splitlines()


def open_log(path: Path) -> BinaryIO:
    """Open a log to read it.

    Raises:
        OSError: it cannot be read, or is no regular file.
    """
    return open(open_regular_file(path), "rb")
