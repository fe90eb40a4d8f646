"""Forecasts of k-NN curves: by hand, their coverage, and a backtest on recorded curves."""

import csv
from pathlib import Path

import numpy as np
import pytest

from results.forecast import Curve, forecast_end

# k-NN of the mini data set, k = 20, after every second of 10 epochs, with twelve seeds: `run mini`
# with pretrain.epochs=10, warmup_epochs=2 and keep_every_epochs=2.
RECORDED = Path(__file__).with_name("mini_curves.csv")


def test_three_curves_gain_alike() -> None:
    """Gains of 10, 11 and 12 points: mean 11, spread 1."""
    finished: list[Curve] = [{0: 10, 5: 20, 10: 30}, {0: 11, 5: 23, 10: 34}, {5: 24, 10: 36}]
    found = forecast_end({0: 10, 5: 22}, finished)
    assert found is not None
    assert (found.expected, found.epoch, found.runs) == (33, 5, 3)
    # t of 90% with two degrees of freedom is 1.88562; 1.88562 * sqrt(1 + 1/3) = 2.1773.
    assert found.low == pytest.approx(33 - 2.1773, abs=1e-3)
    assert found.high == pytest.approx(33 + 2.1773, abs=1e-3)
    assert "22.0 after epoch 5; 33.0 expected at the end, 30.8 to 35.2 at 80%" in found.describe()


def test_with_five_curves_a_good_start_counts_as_far_as_it_did() -> None:
    """The ends are half the start plus 30, exactly."""
    finished: list[Curve] = [{1: x, 9: 30 + x / 2} for x in (10.0, 20.0, 30.0, 40.0, 50.0)]
    found = forecast_end({1: 26.0}, finished)
    assert found is not None
    assert found.expected == pytest.approx(43.0) and found.high - found.low < 1e-6
    # A start that says nothing: all ends are the same.
    flat = forecast_end({1: 26.0}, [{1: x, 9: 60.0} for x in range(10, 60, 10)])
    assert flat is not None and flat.expected == 60.0


def test_without_a_basis_there_is_no_forecast() -> None:
    pair: list[Curve] = [{1: 10.0, 9: 60.0}] * 2
    assert forecast_end({1: 10.0}, pair) is None
    assert forecast_end({}, [*pair, *pair]) is None
    # The newest epoch that enough of the others have.
    found = forecast_end({1: 10.0, 2: 99.0}, [*pair, *pair])
    assert found is not None and (found.epoch, found.value) == (1, 10.0)


@pytest.mark.parametrize("runs", [3, 5, 11])
def test_the_interval_holds_the_end_in_80_percent(runs: int) -> None:
    random = np.random.default_rng(runs)
    draws = 1_000
    hits = 0
    for _ in range(draws):
        starts = random.normal(30, 3, runs + 1)
        # A slope of 1 is what few curves are taken to have.
        ends = 20 + (1.0 if runs < 5 else 0.6) * starts + random.normal(0, 2, runs + 1)
        curves = [{4: x, 8: y} for x, y in zip(starts, ends, strict=True)]
        found = forecast_end({4: starts[0]}, curves[1:])
        assert found is not None
        hits += found.low <= ends[0] <= found.high
    # Four standard errors of 80% in so many draws are 5.1 points.
    assert 74.9 <= 100 * hits / draws <= 85.1


def read_recorded() -> list[dict[int, float]]:
    with RECORDED.open(encoding="utf-8", newline="") as stream:
        return [
            {int(epoch): float(value) for epoch, value in row.items() if epoch != "seed"}
            for row in csv.DictReader(stream)
        ]


@pytest.mark.parametrize("epoch", [0, 2, 4, 6, 8])
def test_backtest_on_the_mini_data(epoch: int) -> None:
    """Each of twelve runs, forecast from the eleven others: 80% means about ten of twelve."""
    curves = read_recorded()
    assert len(curves) == 12
    hits = 0
    for index, curve in enumerate(curves):
        so_far = {at: value for at, value in curve.items() if at <= epoch}
        found = forecast_end(so_far, [*curves[:index], *curves[index + 1 :]])
        assert found is not None and found.runs == 11
        hits += found.low <= curve[max(curve)] <= found.high
    assert hits >= 9
