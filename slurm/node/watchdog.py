"""One rank's side of a job: what a training loop asks, and a watchdog for what it cannot do."""

import faulthandler
import logging
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, NoReturn

from pipeline import attempts
from pipeline.control import Interrupted
from slurm.node.signals import StopSignals

logger = logging.getLogger(__name__)
_CHECK_NEWEST_EVERY_S = 15.0  # each check lists a folder of the shared file system
_REARM_EVERY_S = 10.0
# A rank whose main thread holds the interpreter lock blocks the watchdog thread too. faulthandler's
# timer is a C thread and needs no lock. It fires this much later, so that the watchdog comes first
# wherever it can run.
_BACKSTOP_S = 60.0
# The watchdog looks every second. If it did not for so long, the process was stopped meanwhile:
# Slurm suspends jobs where PreemptMode is SUSPEND. Clocks go on then, so it is no hang.
_STOPPED_S = 30.0
_NOTHING_TO_SAVE_S = 5.0  # grace for a stage without a polling loop: its handler exits at once


@dataclass
class JobControl:
    """`pipeline.control.Control` of a rank in a job."""

    run_dir: Path
    attempt: int
    signals: StopSignals
    step: int | None = None
    last_step_at: float = field(default_factory=time.monotonic)
    # When the process went on after a suspension; None if it was never suspended.
    resumed_at: float | None = None

    def stop_requested(self) -> bool:
        """Return whether a signal came."""
        return bool(self.signals.received)

    def may_write(self) -> bool:
        """Return whether no newer attempt has started."""
        return attempts.is_newest_attempt(self.run_dir, self.attempt)

    def heartbeat(self, step: int) -> None:
        """Note that the loop makes progress. From the first call on, signals wait for the loop."""
        self.step = step
        self.last_step_at = time.monotonic()
        self.signals.loop_polls = True

    def resume(self, seconds: float) -> None:
        """Note that the process was suspended for so long, which counts for no limit."""
        self.resumed_at = time.monotonic()
        self.last_step_at += seconds
        if self.signals.warned_at is not None:
            self.signals.warned_at += seconds

    def was_suspended(self, *, within_s: float) -> bool:
        """Return whether a suspension ended at most so long ago."""
        return self.resumed_at is not None and time.monotonic() - self.resumed_at < within_s

    def saved(self, step: int, seconds: float) -> None:
        """Record the step that is on disk and how long saving took: later lead times follow it."""
        attempts.record_save(self.run_dir, self.attempt, step=step, seconds=seconds)

    def interrupted(self, step: int) -> NoReturn:
        """Raise Interrupted after the state of `step` was saved."""
        self.signals.loop_polls = False
        self.signals.exiting = True
        self.signals.saved = True
        raise Interrupted(f"{self.signals.name}, saved after step {step}")

    def finish(self) -> None:
        """Let signals no longer wait for the loop; act on one that came during the last step."""
        self.signals.loop_polls = False
        if self.signals.received:
            self.signals.interrupt(f"{self.signals.name} after the last step")


@dataclass(kw_only=True)
class Watchdog:
    """Thread that watches a rank while the `with` block runs.

    It reacts to each case at most once. Without a reaction it does not check for that case.

    Attributes:
        log: stacks of a rank that does not let threads run go here.
        grace_s: how long after the warning the loop may take to reach a step boundary and stop.
        hang_s: how long a single step may take.
        on_hang: called with the seconds since the last step when a step takes longer than `hang_s`.
        on_grace_expired: called when the loop has not stopped in `grace_s`.
        on_superseded: called when a newer attempt of the run has started.
    """

    control: JobControl
    log: IO[str]
    grace_s: float
    hang_s: float
    on_hang: Callable[[float], None]
    on_grace_expired: Callable[[], None] | None = None
    on_superseded: Callable[[], None] | None = None

    def __post_init__(self) -> None:
        self._stopped = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="watchdog", daemon=True)
        self._armed_at = self._checked_newest_at = time.monotonic()

    def __enter__(self) -> None:
        self._thread.start()

    def __exit__(self, *_: object) -> None:
        self._stopped.set()
        self.control.signals.wake()
        self._thread.join(5.0)
        faulthandler.cancel_dump_traceback_later()

    def _watch(self) -> None:
        """Check every second, and whenever a signal comes."""
        self._arm()
        before = time.monotonic()
        while not self._stopped.is_set():
            if self.control.signals.wait(1.0):
                self._disarm()
            if self._stopped.is_set():
                return
            now = time.monotonic()
            if now - before > _STOPPED_S:
                logger.info("went on after %.0f s: this process was suspended", now - before)
                self.control.resume(now - before)
            before = now
            if now - self._armed_at > _REARM_EVERY_S:
                self._arm()
            self._check(now)

    def _arm(self) -> None:
        """Restart the timer that ends the process when this thread cannot run any more."""
        self._armed_at = time.monotonic()
        faulthandler.dump_traceback_later(self.hang_s + _BACKSTOP_S, exit=True, file=self.log)

    def _disarm(self) -> None:
        """Stop that timer, as Slurm is about to suspend the process; it is restarted later."""
        faulthandler.cancel_dump_traceback_later()
        self._armed_at = time.monotonic()

    def _check(self, now: float) -> None:
        signals = self.control.signals
        # Before the first heartbeat and after the last step there is no loop that could hang.
        idle_s = now - self.control.last_step_at
        if signals.loop_polls and idle_s > self.hang_s:
            faulthandler.dump_traceback(file=self.log, all_threads=True)
            self.on_hang(idle_s)

        grace_s = self.grace_s if signals.loop_polls else _NOTHING_TO_SAVE_S
        waited_s = 0.0 if signals.warned_at is None else now - signals.warned_at
        if self.on_grace_expired and waited_s > grace_s and not signals.exiting:
            self.on_grace_expired()
            self.on_grace_expired = None  # only once

        if self.on_superseded and now - self._checked_newest_at > _CHECK_NEWEST_EVERY_S:
            self._checked_newest_at = now
            if not self.control.may_write():
                self.on_superseded()
                self.on_superseded = None  # only once
