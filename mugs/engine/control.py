"""How a training is asked to stop, and whether it may still write checkpoints."""

from typing import Any, NoReturn

import torch
import torch.distributed as dist

from mugs import distributed
from pipeline.control import Control


class StaleWriterError(RuntimeError):
    """A newer attempt of this run has started, so this one must not write any more."""


class NullControl:
    """The `Control` of a training without a job: nobody stops it, and nobody else writes."""

    attempt = 1

    def stop_requested(self) -> bool:
        """Return False."""
        return False

    def may_write(self) -> bool:
        """Return True."""
        return True

    def heartbeat(self, step: int) -> None:
        """Do nothing."""

    def saved(self, step: int, seconds: float) -> None:
        """Do nothing."""

    def interrupted(self, step: int) -> NoReturn:
        """Raise RuntimeError: a training without a job is never interrupted."""
        raise RuntimeError(f"interrupted after step {step} without a request to stop")

    def finish(self) -> None:
        """Do nothing."""


class StopConsensus:
    """Agreement of all ranks that one of them was asked to stop (an all-reduce of flags).

    A signal may reach the ranks at different steps, but all must leave after the same one. The
    flags are sent after a step and read after the next step, over a gloo group of their own, so the
    device never waits for them.
    """

    def __init__(self, control: Control) -> None:
        self.control = control
        # gloo reduces on the CPU, where the signal handler sets its flag.
        self.group: Any = dist.new_group(backend="gloo") if distributed.world_size() > 1 else None
        self.vote = torch.zeros(1, dtype=torch.int32)
        self.work: dist.Work | None = None

    def agree_to_stop(self) -> bool:
        """Return whether to stop after this step. Every rank calls it after every step.

        The answer is about the flags sent after the previous step; those of this step are sent now.
        """
        if self.group is None:
            return self.control.stop_requested()
        # First the previous flags, then new ones: at most one all-reduce is in flight.
        agreed = self._count()
        self.vote = torch.tensor([int(self.control.stop_requested())], dtype=torch.int32)
        self.work = dist.all_reduce(
            self.vote, op=dist.ReduceOp.MAX, group=self.group, async_op=True
        )
        return agreed

    def _count(self) -> bool:
        if self.work is not None:
            self.work.wait()
        return bool(self.vote.item())

    def close(self) -> None:
        """Leave the group. All ranks must have made the same steps."""
        # The all-reduce in flight must end on every rank before its group goes.
        self._count()
        if self.group is not None:
            dist.destroy_process_group(self.group)


def check_may_write(control: Control) -> None:
    """Raise StaleWriterError if a newer attempt has started."""
    if not control.may_write():
        raise StaleWriterError(
            f"attempt {control.attempt} is not the newest of its run, "
            "so it may not write checkpoints"
        )
