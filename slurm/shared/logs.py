"""Log files of a run: one per attempt and rank, beside the output of processes without one."""

import logging
import os
import sys
from pathlib import Path
from typing import TextIO

from pipeline.files import open_to_append

FILE_ONLY = "file_only"  # attribute of a log record that goes to the file, not to the screen
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
    """Return the log that says most about the last attempt, of those that are not empty."""
    logs = [
        path
        for path in (run_dir / "logs").glob(pattern)
        if path.suffix in (".log", ".err", ".out") and path.stat().st_size
    ]

    # The log of an attempt says most. Of the raw output of processes, standard error says more.
    def importance(path: Path) -> tuple[bool, bool, float]:
        return path.name.startswith("attempt_"), path.suffix == ".err", path.stat().st_mtime

    return str(max(logs, key=importance)) if logs else None


def read_last_line(log: str | None) -> str:
    """Return the last line that is not blank; nothing if there is no log."""
    if log is None:
        return ""
    path = Path(log)
    with path.open("rb") as file:
        file.seek(max(0, path.stat().st_size - _TAIL_BYTES))  # logs can have many MB
        lines = file.read().decode(errors="replace").splitlines()
    return next((line.strip() for line in reversed(lines) if line.strip()), "")
