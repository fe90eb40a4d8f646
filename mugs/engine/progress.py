"""Progress of a long loop: a bar on a terminal, lines in a log, and a small JSON file."""

import json
import logging
import sys
import time
from collections import deque
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeRemainingColumn
from rich.progress import Progress as RichBar

from pipeline.files import write_atomic

logger = logging.getLogger(__name__)


# Rate and time left are those of the last minute: a mean over hours hides that a disk got slow.
WINDOW_S = 60.0


class Sample(NamedTuple):
    """What was done at a time."""

    time: float
    done: int
    items: int


class Progress:
    """A count of `unit`s up to `total`; `rate` is the number of items per second, in `rate_unit`.

    With `path` the state is written there at most once a second, for `status`. A `quiet` one, on a
    rank other than the first, shows and writes nothing. If the loop is one of several phases,
    `phase` names it, and `later_s` may be set to the seconds that those after it will take.

    A loop of several ranks writes `in_background`: a call of a shared file system that hangs would
    hold up all of them.
    """

    def __init__(
        self,
        label: str,
        total: int,
        *,
        unit: str = "steps",
        rate_unit: str = "img/s",
        path: Path | None = None,
        start: int = 0,
        quiet: bool = False,
        log_seconds: float = 10.0,
        phase: str = "",
        in_background: bool = False,
    ) -> None:
        self.label = label
        self.phase = phase
        self.later_s = 0.0
        self.total = total
        self.unit = unit
        self.rate_unit = rate_unit
        self.path = None if quiet else path
        # A resumed run starts at `start`; its speed counts from there.
        self.done = self.start = start
        self.quiet = quiet
        self.log_seconds = log_seconds
        self.items = 0
        self.last_log = self.last_write = time.monotonic()
        self.writer = (
            ThreadPoolExecutor(1, thread_name_prefix="progress") if in_background else None
        )
        self.write: Future[Path] | None = None
        # The first sample is the newest that is older than the window, or the first of all.
        self.samples = deque([Sample(self.last_write, start, 0)])
        self.bar: RichBar | None = None
        # In a log file of a job a bar would leave only control characters: lines go there.
        if not quiet and sys.stderr.isatty():
            self.bar = RichBar(
                TextColumn("{task.description}"),
                BarColumn(),
                MofNCompleteColumn(),
                TimeRemainingColumn(),
                TextColumn("{task.fields[detail]}"),
                transient=True,
            )
            self.bar.start()
            self.task = self.bar.add_task(label, total=total, completed=start, detail="")

    @property
    def rate(self) -> float:
        """Return the items per second of the last minute."""
        first = self.samples[0]
        return (self.items - first.items) / max(time.monotonic() - first.time, 1e-9)

    @property
    def eta_seconds(self) -> float:
        """Return the seconds to the end at the speed of the last minute."""
        first = self.samples[0]
        seconds = time.monotonic() - first.time
        return seconds / max(self.done - first.done, 1) * (self.total - self.done) + self.later_s

    def update(self, done: int, *, items: int = 1, detail: str = "") -> None:
        """Note that `done` of `total` are finished, and `items` more since the last call."""
        self.done = done
        self.items += items
        now = time.monotonic()
        if now - self.samples[-1].time >= 1.0:
            self.samples.append(Sample(now, self.done, self.items))
            while now - self.samples[1].time > WINDOW_S:
                self.samples.popleft()
        last = done >= self.total
        if self.bar is not None:
            self.bar.update(
                self.task, completed=done, detail=f"{self.rate:.0f} {self.rate_unit} {detail}"
            )
        elif not self.quiet and (last or now - self.last_log >= self.log_seconds):
            self.last_log = now
            logger.info("%s", self.format_line(detail))
        # Once a second at most: the file lies on a shared file system.
        if self.path is not None and (last or now - self.last_write >= 1.0):
            self.last_write = now
            record = {
                "done": self.done,
                "total": self.total,
                "unit": self.unit,
                "rate": self.rate,
                "rate_unit": self.rate_unit,
                "eta_s": self.eta_seconds,
                "time": time.time(),
                **({"phase": self.phase} if self.phase else {}),
            }
            self._write(json.dumps(record), wait=last)

    def _write(self, text: str, *, wait: bool) -> None:
        """Write the file; in the background unless the one before is still being written.

        What goes wrong in the background is raised by the next call.
        """
        assert self.path is not None
        if self.writer is None:
            write_atomic(self.path, text)
            return
        if self.write is not None and (wait or self.write.done()):
            self.write.result()
            self.write = None
        if self.write is None:
            self.write = self.writer.submit(write_atomic, self.path, text)
        if wait:
            self.write.result()

    def format_line(self, detail: str = "") -> str:
        """Return one line: how far, how fast, how long still."""
        text = (
            f"{self.label} {self.done}/{self.total} {self.unit}, {self.rate:.0f} {self.rate_unit}"
        )
        return f"{text}, {self.eta_seconds:.0f} s left" + (f", {detail}" if detail else "")

    def close(self) -> None:
        """Take the bar off the terminal, and wait for the file."""
        if self.writer is not None:
            self.writer.shutdown()
        if self.bar is not None:
            self.bar.stop()
