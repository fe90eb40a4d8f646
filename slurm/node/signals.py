"""Signals that ask a rank to stop: SIGUSR2 (Slurm's early warning), SIGTERM and Ctrl-C.

A handler only notes the signal while a training loop is trusted to ask for it; else it leaves at once, since what runs
has nothing to save. `env --block-signal` keeps the first two pending until the handlers are here.
"""

from __future__ import annotations

import os
import select
import signal
import time
from types import FrameType
from typing import Any

from pipeline.control import Interrupted

LEAD_SECONDS_VARIABLE = "MUGS_LEAD_SECONDS"  # how long before its end Slurm warns the job
BLOCKED_SIGNALS = ("USR2", "TERM")  # pending from the start of Python to the handlers
_ASKING = (signal.SIGUSR2, signal.SIGTERM, signal.SIGINT)


class StopSignals:
    """Signals so far.

    `ignore_repeats`: a second one changes nothing, since Slurm repeats them; else it ends the process at once.
    """

    def __init__(self, *, ignore_repeats: bool) -> None:
        self.ignore_repeats = ignore_repeats
        self.loop_polls = False  # a loop asks now and then
        self.exiting = False
        self.saved = False  # the loop has saved and left, with all ranks
        self.received: list[int] = []
        self.warned_at: float | None = (
            None  # when the warning came, noted by the guard, also while Python is in a C call
        )
        self._reader, self._writer = os.pipe()
        os.set_blocking(self._writer, False)
        self._before: dict[int, Any] = {}

    def __enter__(self) -> StopSignals:
        self._before = {number: signal.signal(number, self._note) for number in _ASKING}
        self._wakeup = signal.set_wakeup_fd(self._writer, warn_on_full_buffer=False)
        return self

    def __exit__(self, *_: object) -> None:
        signal.set_wakeup_fd(self._wakeup)
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def unblock(self) -> None:
        """Let through what was held back since the start of Python; may raise Interrupted."""
        signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGUSR2, signal.SIGTERM})

    def _note(self, number: int, frame: FrameType | None) -> None:
        self.received.append(number)
        if len(self.received) > 1 and not self.ignore_repeats:
            os._exit(128 + number)
        if not self.loop_polls:
            self.interrupt(f"{self.name} while no step was running")

    @property
    def name(self) -> str:
        """Name of the first signal."""
        return signal.Signals(self.received[0]).name if self.received else "nothing"

    @property
    def got_sigterm(self) -> bool:
        """Whether one of them was SIGTERM."""
        return signal.SIGTERM in self.received

    @property
    def warned(self) -> bool:
        """Whether one of them was Slurm's early warning: no failure of another rank brings it."""
        return signal.SIGUSR2 in self.received

    def interrupt(self, reason: str) -> None:
        """Raise Interrupted, once."""
        if not self.exiting:
            self.exiting = True
            raise Interrupted(reason)

    def wake(self) -> None:
        """End a `wait`."""
        os.write(self._writer, b"\0")

    def wait(self, seconds: float) -> None:
        """Sleep, at most until a signal arrives; for a thread of its own."""
        ready, _, _ = select.select([self._reader], [], [], seconds)
        if ready and signal.SIGUSR2 in os.read(self._reader, 4096) and self.warned_at is None:
            self.warned_at = time.monotonic()
