"""Where a k-NN curve will end, from its values so far and from finished runs of the same kind."""

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from statistics import fmean

from results.verdict import student_quantile

# Accuracy in percent by epoch.
Curve = Mapping[int, float]

# Fewer do not know how much seeds differ.
FEWEST_RUNS = 3
# With so many, it is also estimated how far a good start makes a good end.
FEWEST_FOR_SLOPE = 5
# The share of the interval; each side has half of the rest.
COVERAGE = 0.8


@dataclass(frozen=True)
class Forecast:
    """The expected last value of a curve, with the interval that holds it in 80% of all cases."""

    expected: float
    low: float
    high: float
    # What it rests on: the newest value, its epoch, and the number of finished runs.
    value: float
    epoch: int
    runs: int

    def describe(self) -> str:
        """Return it in words."""
        return (
            f"k-NN is {self.value:.1f} after epoch {self.epoch}; {self.expected:.1f} expected at"
            f" the end, {self.low:.1f} to {self.high:.1f} at {100 * COVERAGE:.0f}%,"
            f" from {self.runs} finished runs"
        )


def forecast_end(curve: Curve, finished: Iterable[Curve]) -> Forecast | None:
    """Return where a curve will end; None if too few finished ones have a value at its epoch.

    The end is a linear function of the newest value, fitted to the finished curves. Its slope is 1,
    so that all curves gain alike, until there are enough of them; it is never above 1 nor below 0.
    The interval is that of a prediction: the spread around the line, and the line's own error.
    """
    curves = [other for other in finished if len(other) > 1]
    for epoch in sorted(curve, reverse=True):
        pairs = [(other[epoch], other[max(other)]) for other in curves if epoch in other]
        if len(pairs) >= FEWEST_RUNS:
            return _predict(curve[epoch], epoch, pairs)
    return None


def _predict(value: float, epoch: int, pairs: list[tuple[float, float]]) -> Forecast:
    count = len(pairs)
    start = fmean(x for x, _ in pairs)
    end = fmean(y for _, y in pairs)
    squares = math.fsum((x - start) ** 2 for x, _ in pairs)
    slope = 1.0
    degrees = count - 1
    # How far the new start lies from the others, which a fitted slope makes uncertain.
    leverage = 0.0
    if count >= FEWEST_FOR_SLOPE and squares > 0:
        products = math.fsum((x - start) * (y - end) for x, y in pairs)
        slope = min(max(products / squares, 0.0), 1.0)
        degrees = count - 2
        leverage = (value - start) ** 2 / squares
    residuals = math.fsum((y - end - slope * (x - start)) ** 2 for x, y in pairs)
    error = math.sqrt(residuals / degrees * (1 + 1 / count + leverage))
    width = student_quantile((1 + COVERAGE) / 2, degrees) * error
    expected = end + slope * (value - start)
    return Forecast(
        expected=min(max(expected, 0.0), 100.0),
        low=max(expected - width, 0.0),
        high=min(expected + width, 100.0),
        value=value,
        epoch=epoch,
        runs=count,
    )
