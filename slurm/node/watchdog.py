"""One rank's side of a job: what a training loop asks, and the guard that acts where the loop cannot."""

from __future__ import annotations

import faulthandler
import logging
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import IO, NoReturn

from pipeline import attempts
from pipeline.control import Interrupted
from slurm.node.signals import StopSignals

logger = logging.getLogger(__name__)
_STALE_CHECK_S = 15.0
_BACKSTOP_S = (
    60.0  # after the guard's own turn, for a rank whose main thread holds the interpreter's lock
)
_NOTHING_TO_SAVE_S = 5.0


class JobControl:
    """`pipeline.control.Control` of a real job."""

    def __init__(self, run_dir: Path, attempt: int, signals: StopSignals) -> None:
        self.run_dir, self.attempt, self.signals = run_dir, attempt, signals
        self.step: int | None = None
        self.last_step_at = time.monotonic()

    def stop_requested(self) -> bool:
        """Whether a signal came."""
        return bool(self.signals.received)

    def may_write(self) -> bool:
        """Whether no newer attempt has started."""
        return attempts.is_newest_attempt(self.run_dir, self.attempt)

    def heartbeat(self, step: int) -> None:
        """Note that the loop moves; from the first beat on signals wait for it."""
        self.step, self.last_step_at = step, time.monotonic()
        self.signals.loop_polls = True

    def saved(self, step: int, seconds: float) -> None:
        """Note how far the state on disk is and what saving cost, for the lead time of later jobs."""
        attempts.record_save(self.run_dir, self.attempt, step=step, seconds=seconds)

    def interrupted(self, step: int) -> NoReturn:
        """Leave after the state of `step` was saved."""
        self.signals.loop_polls, self.signals.exiting, self.signals.saved = False, True, True
        raise Interrupted(f"{self.signals.name}, saved after step {step}")

    def finish(self) -> None:
        """Signals no longer wait for the loop; one that came meanwhile is acted on."""
        self.signals.loop_polls = False
        if self.signals.received:
            self.signals.interrupt(f"{self.signals.name} after the last step")


@dataclass(frozen=True)
class Reactions:
    """What the guard does; each is called at most once. None: that case is not looked for.

    late: the loop came to no stop in `patience_s` after the warning. hung: no step for `hang_s`. stale: a newer attempt
    has started.
    """

    grace_s: float
    hang_s: float
    on_hang: Callable[[float], None]
    on_grace_expired: Callable[[], None] | None = None
    on_superseded: Callable[[], None] | None = None


class Watchdog(threading.Thread):
    """Thread that watches a rank. Stacks of a rank that does not even let threads run go into `log`."""

    def __init__(self, control: JobControl, reactions: Reactions, log: IO[str]) -> None:
        super().__init__(name="guard", daemon=True)
        self.control, self.signals, self.reactions, self.log = (
            control,
            control.signals,
            reactions,
            log,
        )
        self.ended = threading.Event()
        self._late = self._stale = False
        self._armed = self._asked = time.monotonic()

    def run(self) -> None:
        """Look every second, or when a signal comes."""
        self._arm()
        while not self.ended.is_set():
            self.signals.wait(1.0)
            if self.ended.is_set():
                return
            now = time.monotonic()
            if now - self._armed > 10.0:
                self._arm()
            self._look(now)

    def _arm(self) -> None:
        self._armed = time.monotonic()
        faulthandler.dump_traceback_later(
            self.reactions.hang_s + _BACKSTOP_S, exit=True, file=self.log
        )

    def _look(self, now: float) -> None:
        react, signals = self.reactions, self.signals
        still = now - self.control.last_step_at
        if signals.loop_polls and still > react.hang_s:
            faulthandler.dump_traceback(file=self.log, all_threads=True)
            react.on_hang(still)
        grace = react.grace_s if signals.loop_polls else _NOTHING_TO_SAVE_S
        waited = now - signals.warned_at if signals.warned_at is not None else 0.0
        if react.on_grace_expired and not self._late and not signals.exiting and waited > grace:
            self._late = True
            react.on_grace_expired()
        if react.on_superseded and not self._stale and now - self._asked > _STALE_CHECK_S:
            self._asked = now
            if not self.control.may_write():
                self._stale = True
                react.on_superseded()

    def end(self) -> None:
        """Stop watching."""
        self.ended.set()
        self.signals.wake()
        self.join(5.0)
        faulthandler.cancel_dump_traceback_later()
