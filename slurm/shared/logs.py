"""Log files of a run: one per attempt and rank, and beside them what processes say before they have one."""

from __future__ import annotations

import logging
import os
import sys
from pathlib import Path

FILE_ONLY = "file_only"  # attribute of a log record that does not go to the screen


def log_path(run_dir: Path, attempt: int, rank: int) -> Path:
    """Log file of one rank in one attempt."""
    return run_dir / "logs" / f"attempt_{attempt:04d}_rank{rank}.log"


def start_logging(path: Path, *, screen: bool) -> None:
    """Send what is logged from now on to the file and, but for records with FILE_ONLY, to the screen."""
    path.parent.mkdir(parents=True, exist_ok=True)
    formatter = logging.Formatter("%(asctime)s %(levelname)s %(name)s: %(message)s")
    handlers: list[logging.Handler] = [logging.FileHandler(path, encoding="utf-8")]
    if screen:
        shown = logging.StreamHandler(sys.stdout)
        shown.addFilter(lambda record: not hasattr(record, FILE_ONLY))
        handlers.append(shown)
    root = logging.getLogger()
    for old in list(root.handlers):
        root.removeHandler(old)
    for handler in handlers:
        handler.setFormatter(formatter)
        root.addHandler(handler)
    root.setLevel(os.environ.get("MUGS_LOG_LEVEL", "INFO").upper())
    logging.captureWarnings(True)


def find_newest_log(run_dir: Path, pattern: str = "*") -> str | None:
    """The log that says most about the last attempt: the newest that is not empty, error logs first."""
    files = (run_dir / "logs").glob(pattern)
    logs = [p for p in files if p.suffix in (".log", ".err", ".out") and p.stat().st_size]
    if not logs:
        return None
    return str(
        max(
            logs,
            key=lambda p: (p.name.startswith("attempt_"), p.suffix == ".err", p.stat().st_mtime),
        )
    )


def read_last_line(log: str | None) -> str:
    """The last line that is not blank; nothing where there is no log."""
    if log is None:
        return ""
    with open(log, "rb") as file:
        file.seek(max(0, Path(log).stat().st_size - 8192))
        lines = [
            line.strip()
            for line in file.read().decode(errors="replace").splitlines()
            if line.strip()
        ]
    return lines[-1] if lines else ""
