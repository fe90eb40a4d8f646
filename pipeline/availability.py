"""How much of a long training's time is training: a model of failures, preemptions and checkpoints.

Failures come at random, at the rate that Meta published for Llama 3 (arXiv 2407.21783, section 3.3.4: 419 unexpected
interruptions in 54 days on 16,384 GPUs). They cost what was done since the last checkpoint and a restart. Preemptions
come at fixed times; a warning lets the job save first, so they cost that save and a restart. A checkpoint stops the
training for `stall_s`, and is on disk after `durable_s`.
"""

from __future__ import annotations

import math
import random
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


@dataclass(frozen=True)
class Account:
    """Where the time of one simulated training went, in seconds; `effective` is its share of training."""

    total_s: float
    trained_s: float
    stalled_s: float
    lost_s: float
    restarting_s: float
    failures: int
    preemptions: int

    @property
    def effective(self) -> float:
        """Effective training time ratio."""
        return self.trained_s / self.total_s


def best_interval_s(conditions: Conditions) -> float:
    """Time between checkpoints that loses least: Daly's estimate (2006), Young's with higher-order terms."""
    cost, mean = max(conditions.stall_s, 0.01), conditions.failure_every_s
    if cost >= 2 * mean:
        return mean
    half = math.sqrt(cost / (2 * mean))
    return math.sqrt(2 * cost * mean) * (1 + half / 3 + half * half / 9) - cost


def expected_ratio(conditions: Conditions, interval_s: float) -> float:
    """Effective training time ratio in the mean, to first order."""
    c = conditions
    lost = c.stall_s / interval_s + (interval_s / 2 + c.durable_s + c.restart_s) / c.failure_every_s
    if c.warned:
        lost += (c.durable_s + c.restart_s) / c.preempt_every_s
    return 1 / (1 + lost)


def simulate(conditions: Conditions, need_s: float, interval_s: float, seed: int = 0) -> Account:
    """One training of `need_s` seconds of steps, event by event."""
    c, rng = conditions, random.Random(seed)
    clock = trained = stalled = lost = restarting = 0.0
    failures = preemptions = 0
    saved, since = 0.0, 0.0  # progress on disk, and training since the last checkpoint was begun
    failure = rng.expovariate(c.gpus * GPU_FAILURES_PER_S)
    preemption = c.preempt_every_s
    while trained < need_s:
        step = min(interval_s - since, need_s - trained)
        stop = min(failure, preemption)
        if clock + step <= stop:
            clock, trained, since = clock + step, trained + step, since + step
            if since >= interval_s:
                clock, stalled = clock + c.stall_s, stalled + c.stall_s
                saved, since = trained, 0.0
            continue
        advance = max(0.0, stop - clock)
        clock, trained = clock + advance, trained + advance
        if stop == preemption and c.warned:
            clock, stalled, saved = clock + c.durable_s, stalled + c.durable_s, trained
        lost, trained, since = lost + trained - saved, saved, 0.0
        if stop == preemption:
            preemptions, preemption = preemptions + 1, clock + c.restart_s + c.preempt_every_s
        else:
            failures, failure = failures + 1, clock + rng.expovariate(c.gpus * GPU_FAILURES_PER_S)
        clock, restarting = clock + c.restart_s, restarting + c.restart_s
    return Account(clock, trained, stalled, lost, restarting, failures, preemptions)
