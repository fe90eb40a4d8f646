"""What surrounds a training: who may ask it to stop, and who may write its checkpoints."""

from typing import Any, NoReturn, Protocol

import torch
import torch.distributed as dist
from torch import Tensor

from mugs.engine import distributed


class StaleWriterError(RuntimeError):
    """A newer attempt of this training has started; this one must not write any more."""


class Control(Protocol):
    """The surroundings of one rank, as the loop asks and tells them."""

    @property
    def attempt(self) -> int:
        """Number of this start of the run; of two, the higher one is the newer."""

    def stop_requested(self) -> bool:
        """Whether this rank was asked to stop."""

    def may_write(self) -> bool:
        """Whether no newer attempt has started."""

    def beat(self, step: int) -> None:
        """`step` steps are done, more will follow."""

    def saved(self, step: int, seconds: float) -> None:
        """The state after `step` steps is on disk; it took this long."""

    def interrupted(self, step: int) -> NoReturn:
        """Leave, on all ranks, after the state of `step` was saved as asked for. Raises."""

    def rest(self) -> None:
        """No step will follow."""


class Unattended:
    """No surroundings: nobody stops the training, nobody else writes."""

    attempt = 1

    def stop_requested(self) -> bool:
        """Never."""
        return False

    def may_write(self) -> bool:
        """Always."""
        return True

    def beat(self, step: int) -> None:
        """Nobody listens."""

    def saved(self, step: int, seconds: float) -> None:
        """Nobody listens."""

    def interrupted(self, step: int) -> NoReturn:
        """Nobody asked."""
        raise RuntimeError(f"interrupted after step {step}, though nobody asked")

    def rest(self) -> None:
        """Nobody listens."""


class StopVote:
    """Whether any rank was asked to stop: cast after a step, counted after the next, the same on all ranks.

    The votes travel over a gloo group of their own while the next step runs, so that no device waits for them.
    """

    def __init__(self, control: Control) -> None:
        self.control = control
        self.group: Any = dist.new_group(backend="gloo") if distributed.world_size() > 1 else None
        self.vote: Tensor | None = None
        self.work: dist.Work | None = None

    def stop(self) -> bool:
        """Count the votes of the step before and cast those of this one. Every rank calls it after every step."""
        if self.group is None:
            return self.control.stop_requested()
        agreed = self._count()
        self.vote = torch.tensor([int(self.control.stop_requested())], dtype=torch.int32)
        self.work = dist.all_reduce(
            self.vote, op=dist.ReduceOp.MAX, group=self.group, async_op=True
        )
        return agreed

    def _count(self) -> bool:
        if self.work is None or self.vote is None:
            return False
        self.work.wait()
        return bool(self.vote.item())

    def close(self) -> None:
        """Wait for the last votes and leave the group; only after all ranks made the same steps."""
        self._count()
        self.vote = self.work = None
        if self.group is not None:
            dist.destroy_process_group(self.group)
            self.group = None


def fence(control: Control) -> None:
    """Raise StaleWriterError when a newer attempt has started."""
    if not control.may_write():
        raise StaleWriterError(
            f"attempt {control.attempt} is not the newest of its run, it may not write checkpoints"
        )
