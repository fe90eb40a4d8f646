"""Jobs around a training: one asks it to stop after some steps, one notes what it saves."""

from typing import NoReturn

from mugs import distributed
from mugs.engine.control import NullControl


class StoppedError(Exception):
    """The training has stopped, at the step that it holds."""


class StopAfter(NullControl):
    """Ask for a stop after some steps; the votes of several ranks for it count a step later."""

    def __init__(self, steps: int) -> None:
        self.steps = steps - (distributed.world_size() > 1)
        self.done = 0

    def heartbeat(self, step: int) -> None:
        """Note a step."""
        self.done = step

    def stop_requested(self) -> bool:
        """Whether the steps are made."""
        return self.done >= self.steps

    def interrupted(self, step: int) -> NoReturn:
        """Leave the training."""
        raise StoppedError(step)


class NoteSaves(NullControl):
    """Note the steps that are said to be saved."""

    def __init__(self) -> None:
        self.saves: list[int] = []

    def saved(self, step: int, seconds: float) -> None:
        """Note a step."""
        self.saves.append(step)
