"""Effective training time ratio: a model of failures, preemptions and checkpoints.

Failures come at random. Each costs what was done since the last checkpoint, and a restart.
Preemptions come at fixed times; a warning lets the job save first, so each costs that save and a
restart. A checkpoint stops the training for `stall_s`, and is on disk after `durable_s`.
"""

import math
from dataclasses import dataclass

# Llama 3 (arXiv 2407.21783, section 3.3.4): 419 unexpected interruptions in 54 days on 16,384 GPUs.
GPU_FAILURES_PER_S = 419 / (54 * 86400 * 16384)


@dataclass(frozen=True, kw_only=True)
class Conditions:
    """What a training meets, in seconds.

    Attributes:
        stall_s: how long a checkpoint stops the training.
        durable_s: how long until a checkpoint is on disk.
        restart_s: from a stop to the first new step, the wait in the queue included.
        preempt_every_s: time between preemptions.
        warned: a warning before a preemption lets the job save.
    """

    gpus: int
    stall_s: float
    durable_s: float
    restart_s: float
    preempt_every_s: float = math.inf
    warned: bool = True

    @property
    def failure_every_s(self) -> float:
        """The mean time between stops that come without a warning."""
        rate = self.gpus * GPU_FAILURES_PER_S + (0.0 if self.warned else 1 / self.preempt_every_s)
        return 1 / rate if rate else math.inf


def best_checkpoint_interval_s(conditions: Conditions) -> float:
    """Return the time between checkpoints that loses least.

    Young's estimate sqrt(2 C M), for a checkpoint cost C and a mean time M between failures, with
    the higher-order terms of Daly (2006).
    """
    cost_s = max(conditions.stall_s, 0.01)  # a checkpoint that costs nothing would be made always
    mean_s = conditions.failure_every_s
    if cost_s >= 2 * mean_s:
        return mean_s
    half = math.sqrt(cost_s / (2 * mean_s))
    return math.sqrt(2 * cost_s * mean_s) * (1 + half / 3 + half * half / 9) - cost_s


def effective_time_ratio(conditions: Conditions, interval_s: float) -> float:
    """Return the mean effective training time ratio, to first order, with a checkpoint interval."""
    c = conditions
    # On average a failure comes in the middle of an interval.
    lost = c.stall_s / interval_s + (interval_s / 2 + c.durable_s + c.restart_s) / c.failure_every_s
    if c.warned:
        lost += (c.durable_s + c.restart_s) / c.preempt_every_s
    return 1 / (1 + lost)
