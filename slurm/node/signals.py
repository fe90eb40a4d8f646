"""Signals that ask a rank to stop: SIGUSR2 (Slurm's early warning), SIGTERM and Ctrl-C.

A handler runs between any two Python instructions, so it must not save anything itself. While a
training loop polls for signals, the handler only notes them, and the loop saves at its next step
boundary. Otherwise nothing could be saved, and the handler raises Interrupted at once.
"""

import faulthandler
import os
import select
import signal
import time
from types import FrameType
from typing import Any, Self

from pipeline.control import Interrupted

LEAD_SECONDS_VARIABLE = "MUGS_LEAD_SECONDS"  # how long before the end of a job Slurm warns it
# Slurm sends it to a job that it suspends, and SIGSTOP two seconds later.
_SUSPEND = signal.SIGTSTP
_HANDLED = (signal.SIGUSR2, signal.SIGTERM, signal.SIGINT)


class StopSignals:
    """The signals received so far, and what the main thread does about them.

    With `ignore_repeats` a second signal changes nothing: Slurm repeats its signals. It also
    announces a suspension by one. Otherwise a second signal, such as a second Ctrl-C, ends the
    process at once.
    """

    def __init__(self, *, ignore_repeats: bool) -> None:
        self.ignore_repeats = ignore_repeats
        self.loop_polls = False  # a training loop asks for signals after every step
        self.exiting = False  # Interrupted was raised and must not be raised again
        self.saved = False  # all ranks have saved the same step because of a signal
        self.received: list[int] = []
        # When the early warning came. The watchdog sets it, because Python calls no handler during
        # a long C call.
        self.warned_at: float | None = None
        # Python writes the number of each signal to this pipe as soon as it arrives; the watchdog
        # waits on the pipe.
        self._reader, self._writer = os.pipe()
        os.set_blocking(self._writer, False)

    def __enter__(self) -> Self:
        self._previous: dict[int, Any] = {
            number: signal.signal(number, self._handle) for number in _HANDLED
        }
        if self.ignore_repeats:
            self._previous[_SUSPEND] = signal.signal(_SUSPEND, await_suspension)
        self._previous_wakeup = signal.set_wakeup_fd(self._writer, warn_on_full_buffer=False)
        return self

    def __exit__(self, *_: object) -> None:
        signal.set_wakeup_fd(self._previous_wakeup)
        for number, handler in self._previous.items():
            signal.signal(number, handler)

    def unblock(self) -> None:
        """Let through the signals that `slurm.node.job` has held back since its first line.

        Raises:
            Interrupted: one of them has come already.
        """
        signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGUSR2, signal.SIGTERM})

    def _handle(self, number: int, frame: FrameType | None) -> None:
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
        """Whether one of the signals was SIGTERM."""
        return signal.SIGTERM in self.received

    @property
    def warned(self) -> bool:
        """Whether one of the signals was Slurm's early warning.

        Unlike SIGTERM, it never comes from srun because another rank has failed.
        """
        return signal.SIGUSR2 in self.received

    def interrupt(self, reason: str) -> None:
        """Raise Interrupted, but only the first time this is called."""
        if not self.exiting:
            self.exiting = True
            raise Interrupted(reason)

    def wake(self) -> None:
        """End a `wait` of another thread."""
        os.write(self._writer, b"\0")

    def wait(self, seconds: float) -> bool:
        """Sleep until a signal arrives, at most `seconds`. Called by the watchdog thread only.

        Returns whether the process is about to be suspended.
        """
        ready = select.select([self._reader], [], [], seconds)[0]
        arrived = os.read(self._reader, 4096) if ready else b""
        if signal.SIGUSR2 in arrived and self.warned_at is None:
            self.warned_at = time.monotonic()
        return _SUSPEND in arrived


def await_suspension(number: int, frame: FrameType | None) -> None:
    """Stop the timer that ends a process which hangs; the watchdog starts it again.

    Its clock goes on while the process is stopped. This is called after a long C call only when the
    process was stopped and goes on again, so it does not stop the process itself.
    """
    faulthandler.cancel_dump_traceback_later()
