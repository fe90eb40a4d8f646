"""The model of failures,
preemptions and checkpoints against sums done by hand and against itself.
"""

import math
from dataclasses import replace

import pytest
from simulation import simulate

from pipeline.availability import Conditions, best_checkpoint_interval_s, effective_time_ratio

DAY = 86400.0
RUN = Conditions(gpus=40, stall_s=2, durable_s=20, restart_s=120, preempt_every_s=7200)


def test_failure_rate_is_the_published_one() -> None:
    whole = replace(RUN, gpus=16384, preempt_every_s=math.inf)
    assert whole.failure_every_s == pytest.approx(54 * DAY / 419)
    assert RUN.failure_every_s / DAY == pytest.approx(52.8, abs=0.1)
    assert replace(RUN, warned=False).failure_every_s == pytest.approx(7200, rel=0.01)


def test_the_best_interval_is_a_minimum_of_the_loss() -> None:
    best = best_checkpoint_interval_s(RUN)
    assert best == pytest.approx(math.sqrt(2 * 2 * RUN.failure_every_s), rel=0.01)
    for other in (best / 2, best * 2):
        assert effective_time_ratio(RUN, other) < effective_time_ratio(RUN, best)


def test_the_interval_and_the_ratio_by_hand() -> None:
    """A save of 2 s and a failure each 100 s; half = sqrt(2 / 200) = 0.1, so 20 (1 + ...) - 2."""
    gpus = round(54 * DAY * 16384 / 419 / 100)
    often = replace(RUN, gpus=gpus, preempt_every_s=math.inf)
    assert often.failure_every_s == pytest.approx(100)
    assert best_checkpoint_interval_s(often) == pytest.approx(20 * (1 + 0.1 / 3 + 0.01 / 9) - 2)
    # 2 s of 20 saving; of each 100 s, 10 s since the checkpoint, 20 s until it was there and 120 s.
    assert effective_time_ratio(often, 20) == pytest.approx(1 / (1 + 0.1 + 1.5))
    warned = replace(often, preempt_every_s=700)
    assert effective_time_ratio(warned, 20) == pytest.approx(1 / (1 + 0.1 + 1.5 + 140 / 700))


@pytest.mark.parametrize(
    ("stall_s", "mean_s", "expected"),
    [
        (201, 100, 100),  # a save that takes twice the time between failures: after each
        (199, 100, math.sqrt(39800) * (1 + math.sqrt(0.995) / 3 + 0.995 / 9) - 199),
        (0, 20000, 20 * (1 + 0.0005 / 3 + 0.0005**2 / 9) - 0.01),
    ],
)
def test_dear_and_free_saves(stall_s: float, mean_s: float, expected: float) -> None:
    gpus = 54 * DAY * 16384 / 419 / mean_s
    run = replace(RUN, gpus=gpus, stall_s=stall_s)
    assert best_checkpoint_interval_s(run) == pytest.approx(expected)


def test_nothing_fails_without_gpus() -> None:
    assert replace(RUN, gpus=0).failure_every_s == math.inf


def test_preemptions_alone_by_hand() -> None:
    """Two hours of training, then 20 s to save and 120 s to be back;
    a checkpoint each hour but at the warning.
    """
    account = simulate(replace(RUN, gpus=0 + 1, stall_s=0), need_s=DAY, interval_s=3600, seed=3)
    assert account.failures == 0 and account.lost_s == 0
    assert account.preemptions == 11 and account.total_s == pytest.approx(DAY + 11 * 140)


def test_without_a_warning_the_time_since_the_checkpoint_is_lost() -> None:
    account = simulate(
        replace(RUN, gpus=1, stall_s=0, warned=False), need_s=DAY, interval_s=5000, seed=3
    )
    assert account.lost_s == pytest.approx(account.preemptions * 2200, rel=0.01)
    assert account.total_s == pytest.approx(DAY + account.lost_s + account.restarting_s)


def test_simulation_agrees_with_the_expectation() -> None:
    busy = replace(RUN, gpus=16384)
    assert sum(
        [simulate(busy, need_s=20 * DAY, interval_s=600, seed=seed).effective for seed in range(5)]
    ) / 5 == pytest.approx(effective_time_ratio(busy, 600), abs=0.005)
