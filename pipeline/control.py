"""What a stage that trains asks and tells the job around it, and how a job is left before it is done."""

from __future__ import annotations

from typing import NoReturn, Protocol


class Interrupted(BaseException):
    """The run was asked to stop and did; the next attempt goes on from its last checkpoint. Not a failure."""


class Control(Protocol):
    """One rank's side of the job, as a training loop uses it."""

    @property
    def attempt(self) -> int:
        """Number of this start of the run; of two, the higher one is the newer."""

    def stop_requested(self) -> bool:
        """Whether this rank was asked to stop."""

    def may_write(self) -> bool:
        """Whether no newer attempt has started: only then may checkpoints be written."""

    def beat(self, step: int) -> None:
        """`step` steps are done, more will follow; from now on the loop is trusted to ask for stops."""

    def saved(self, step: int, seconds: float) -> None:
        """The state after `step` steps is on disk; it took this long."""

    def interrupted(self, step: int) -> NoReturn:
        """Raise Interrupted: the state of `step` was saved as asked for."""

    def rest(self) -> None:
        """No step will follow."""
