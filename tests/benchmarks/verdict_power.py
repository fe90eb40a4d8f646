"""How often verdicts are right: the power table of docs/verdicts.md, by simulation.

    python tests/benchmarks/verdict_power.py

prints its rows, in about a minute.
"""

import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np

ROOT = Path(__file__).resolve().parents[2]
if __name__ == "__main__":
    sys.path.insert(0, str(ROOT))

from results.verdict import Comparison  # noqa: E402

DRAWS = 10_000
DIFFERENCES = (0.0, 0.3, 0.5, 1.0)
SEEDS = (1, 3)
# Accuracies of about this size, in the tables with so many images.
ACCURACIES = {50_000: 75.6, 6_149: 98.0}
OUTCOMES = ("reproduced", "lower", "higher", "undecided")


def simulate(
    difference: float, images: int, seeds: int, *, seed_spread: float = 0.0, draws: int = DRAWS
) -> dict[str, float]:
    """Return the share of each outcome, in percent, if ours is truly lower by a difference."""
    generator = np.random.default_rng([int(10 * difference), images, seeds])
    accuracy = ACCURACIES[images]
    truth = np.full((draws, seeds + 1), accuracy - difference)
    truth[:, 0] = accuracy
    truth = np.minimum(truth + seed_spread * generator.standard_normal(truth.shape), 100.0)
    drawn = 100 * generator.binomial(images, truth / 100) / images
    # The paper prints one decimal.
    printed = np.round(drawn[:, 0], 1).tolist()
    outcomes = [
        Comparison(values=tuple(values), paper=paper, images=images).decide()
        for values, paper in zip(drawn[:, 1:].tolist(), printed, strict=True)
    ]
    return {outcome: 100 * outcomes.count(outcome) / draws for outcome in OUTCOMES}


def make_power_rows() -> Iterator[str]:
    """Yield the rows of the power table, as docs/verdicts.md has them."""
    for images in ACCURACIES:
        for seeds in SEEDS:
            for difference in DIFFERENCES:
                shares = simulate(difference, images, seeds)
                texts = " | ".join(f"{shares[outcome]:.0f}" for outcome in OUTCOMES)
                yield f"| {images:,} | {seeds} | {difference} | {texts} |"


if __name__ == "__main__":
    for row in make_power_rows():
        sys.stdout.write(f"{row}\n")
