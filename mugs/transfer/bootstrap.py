"""Standard errors of scores that are no mean over images, by drawing the images again.

Each draw takes as many images (or videos) as there are, with repetition; the standard deviation of
the score over draws estimates its sampling error (Efron, Ann. Statist. 7, 1979).
"""

from collections.abc import Callable

import numpy as np

DRAWS = 1000


def draw_counts(items: int, draws: int, seed: int = 0) -> np.ndarray:
    """Return how often each item is drawn, (draws, items); the same in every process."""
    generator = np.random.default_rng([seed, items])
    return generator.multinomial(items, np.full(items, 1 / items), size=draws)


def bootstrap_errors(
    items: int, score: Callable[[np.ndarray], np.ndarray], *, draws: int = DRAWS
) -> np.ndarray:
    """Return the standard error of each score.

    `score` maps counts (n, items) to scores (n, metrics). A single item tells nothing: NaN.
    """
    if items < 2:
        return np.full(score(np.ones((1, items), dtype=np.int64)).shape[1], np.nan)
    return np.asarray(np.nanstd(score(draw_counts(items, draws)), axis=0, ddof=1))
