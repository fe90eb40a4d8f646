"""What a training loop asks and tells the job around it, and how a run stops before it is done."""

from typing import NoReturn, Protocol


class Interrupted(BaseException):
    """The run was asked to stop and did. This is no failure: the next attempt resumes from there.

    A BaseException, so that no `except Exception` of a stage takes it for an error.
    """


class Control(Protocol):
    """One rank's side of the job, as a training loop uses it."""

    @property
    def attempt(self) -> int:
        """Number of this start of the run; a later start has a higher one."""

    def stop_requested(self) -> bool:
        """Whether this rank was asked to stop."""

    def may_write(self) -> bool:
        """Whether this is still the newest attempt: only then may it write checkpoints."""

    def heartbeat(self, step: int) -> None:
        """Say that `step` steps are done and more will follow.

        From the first heartbeat on, a signal to stop waits for the loop to ask `stop_requested`.
        """

    def saved(self, step: int, seconds: float) -> None:
        """Say that the state after `step` steps is on disk, and how long writing it took."""

    def interrupted(self, step: int) -> NoReturn:
        """Raise Interrupted, after the state of `step` was saved because of a request to stop."""

    def finish(self) -> None:
        """Say that no further step will follow."""
