"""How a training is asked to stop, and whether it may still write checkpoints."""

from collections.abc import Callable
from typing import NoReturn

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
    flags are sent after a step and read after the next one, which by then has been handed to the
    device: while the host waits for the answer, the device computes. They use the process group of
    the gradients. A second one, over gloo, would connect the ranks by the names of their hosts,
    which on many clusters are addresses of the loopback interface.
    """

    def __init__(self, control: Control) -> None:
        self.control = control
        self.device = distributed.find_collective_device() if dist.is_initialized() else None
        self.vote = torch.zeros(1, dtype=torch.int32)
        self.wait_for_answer: Callable[[], object] = lambda: None

    def agree_to_stop(self) -> bool:
        """Return whether to stop after this step. Every rank calls it after every step.

        The answer is about the flags sent after the previous step; those of this step are sent now.
        """
        if self.device is None:
            return self.control.stop_requested()
        # First the previous flags, then new ones: at most one all-reduce is in flight.
        agreed = self._read_answer()
        self._send(self.control.stop_requested(), self.device)
        return agreed

    def _send(self, flag: bool, device: torch.device) -> None:
        self.vote = torch.tensor([int(flag)], dtype=torch.int32)
        if device.type == "cpu":
            work = dist.all_reduce(self.vote, op=dist.ReduceOp.MAX, async_op=True)
            self.wait_for_answer = work.wait
            return
        # Page-locked memory goes to the device and back without a wait.
        self.vote = self.vote.pin_memory()
        vote = self.vote.to(device, non_blocking=True)
        dist.all_reduce(vote, op=dist.ReduceOp.MAX)
        self.vote.copy_(vote, non_blocking=True)
        arrival = torch.cuda.Event(blocking=True)  # type: ignore[no-untyped-call]
        arrival.record()
        self.wait_for_answer = arrival.synchronize

    def _read_answer(self) -> bool:
        self.wait_for_answer()
        return bool(self.vote.item())

    def close(self) -> None:
        """Wait for the flags in flight. All ranks must have made the same steps."""
        self._read_answer()


def check_may_write(control: Control) -> None:
    """Raise StaleWriterError if a newer attempt has started."""
    if not control.may_write():
        raise StaleWriterError(
            f"attempt {control.attempt} is not the newest of its run, "
            "so it may not write checkpoints"
        )
