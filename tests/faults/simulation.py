"""A training as `pipeline.availability` models it, event by event."""

import random
from dataclasses import dataclass

from pipeline.availability import GPU_FAILURES_PER_S, Conditions


@dataclass(frozen=True)
class Account:
    """Where the time of one simulated training went, in seconds;
    `effective` is its share of training.
    """

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
