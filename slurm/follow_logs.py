"""What is new in the logs of runs, for `logs --follow`."""

import os
from collections.abc import Iterator, Sequence
from pathlib import Path

from slurm.shared.logs import MOST_BYTES, find_newest_log, open_log
from slurm.status import RunStatus


class LogFollower:
    """Knows how far each log was shown.

    Of the logs that are there at the first look, the last `lines` lines are shown; of those of
    later attempts, all.
    """

    def __init__(self, run_root: Path, lines: int) -> None:
        self._run_root = run_root
        self._lines: int | None = lines
        self._ends: dict[str, int] = {}
        self._refused: set[str] = set()
        self._last = ""  # the log that was shown last

    def read_new(self, found: Sequence[RunStatus]) -> Iterator[str]:
        """Yield the lines that the logs of runs have gained, below the path of their log."""
        for status in found:
            log = status.log or find_newest_log(status.run.run_dir(self._run_root))
            if log is None:
                if self._lines is not None:
                    yield f"==> {status.run.name}: no log yet"
                continue
            try:
                lines = self._read_log(log, at_work=status.state == "running")
            except OSError as error:
                lines = [f"unreadable: {log}: {error.strerror}"] if log not in self._refused else []
                self._refused.add(log)
            if lines and log != self._last:
                yield f"==> {log}"
                self._last = log
            yield from lines
        self._lines = None

    def _read_log(self, log: str, *, at_work: bool) -> list[str]:
        with open_log(Path(log)) as file:
            size = os.fstat(file.fileno()).st_size
            start = self._ends.get(log, 0)
            if self._lines is not None:
                start = max(0, size - MOST_BYTES)
            elif size < start:  # written anew
                start = 0
            file.seek(start)
            content = file.read(MOST_BYTES)
        if at_work:
            # A line that is not complete yet is shown with its rest.
            content = content[: content.rfind(b"\n") + 1]
        self._ends[log] = start + len(content)
        lines = content.decode(errors="replace").splitlines()
        return lines if self._lines is None else lines[-self._lines :]
