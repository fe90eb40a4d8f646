"""How much of a long training's time is training: a model of failures, preemptions and checkpoints.

Failures come at random, at the rate that Meta published for Llama 3 (arXiv 2407.21783, section 3.3.4: 419 unexpected
interruptions in 54 days on 16,384 GPUs). They cost what was done since the last checkpoint and a restart. Preemptions
come at fixed times; a warning lets the job save first, so they cost that save and a restart. A checkpoint stops the
training for `stall_s`, and is on disk after `durable_s`.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

GPU_FAILURES_PER_S = 419 / (54 * 86400 * 16384)


@dataclass(frozen=True, kw_only=True)
class Conditions:
    """What a training meets. `restart_s`: from a stop to the first new step, the wait in the queue included."""

    gpus: int
    stall_s: float
    durable_s: float
    restart_s: float
    preempt_every_s: float = math.inf
    warned: bool = True

    @property
    def failure_every_s(self) -> float:
        """Mean time between stops that come without a warning."""
        rate = self.gpus * GPU_FAILURES_PER_S + (0.0 if self.warned else 1 / self.preempt_every_s)
        return 1 / rate if rate else math.inf


def best_checkpoint_interval_s(conditions: Conditions) -> float:
    """Time between checkpoints that loses least: Daly's estimate (2006), Young's with higher-order terms."""
    cost, mean = max(conditions.stall_s, 0.01), conditions.failure_every_s
    if cost >= 2 * mean:
        return mean
    half = math.sqrt(cost / (2 * mean))
    return math.sqrt(2 * cost * mean) * (1 + half / 3 + half * half / 9) - cost


def effective_time_ratio(conditions: Conditions, interval_s: float) -> float:
    """Effective training time ratio in the mean, to first order."""
    c = conditions
    lost = c.stall_s / interval_s + (interval_s / 2 + c.durable_s + c.restart_s) / c.failure_every_s
    if c.warned:
        lost += (c.durable_s + c.restart_s) / c.preempt_every_s
    return 1 / (1 + lost)
