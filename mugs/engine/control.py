"""What surrounds a training: who may ask it to stop, and who may write its checkpoints."""

from typing import Any, NoReturn

import torch
import torch.distributed as dist
from torch import Tensor

from mugs import distributed
from pipeline.control import Control


class StaleWriterError(RuntimeError):
    """A newer attempt of this training has started; this one must not write any more."""


class NullControl:
    """`pipeline.control.Control` without a job: nobody stops the training, nobody else writes."""

    attempt = 1

    def stop_requested(self) -> bool:
        """Never."""
        return False

    def may_write(self) -> bool:
        """Always."""
        return True

    def heartbeat(self, step: int) -> None:
        """Nobody listens."""

    def saved(self, step: int, seconds: float) -> None:
        """Nobody listens."""

    def interrupted(self, step: int) -> NoReturn:
        """Nobody asked."""
        raise RuntimeError(f"interrupted after step {step}, though nobody asked")

    def finish(self) -> None:
        """Nobody listens."""


class StopConsensus:
    """Whether any rank was asked to stop: cast after a step, counted after the next, the same on all ranks.

    The votes travel over a gloo group of their own while the next step runs, so that no device waits for them.
    """

    def __init__(self, control: Control) -> None:
        self.control = control
        self.group: Any = dist.new_group(backend="gloo") if distributed.world_size() > 1 else None
        self.vote: Tensor | None = None
        self.work: dist.Work | None = None

    def agree_to_stop(self) -> bool:
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


def check_may_write(control: Control) -> None:
    """Raise StaleWriterError when a newer attempt has started."""
    if not control.may_write():
        raise StaleWriterError(
            f"attempt {control.attempt} is not the newest of its run, it may not write checkpoints"
        )
