"""What a method draws of an image besides its views."""

from collections.abc import Callable

import numpy as np
from numpy.random import Generator

from mugs.data.views.plan import ViewPlan

Annotate = Callable[[Generator, ViewPlan, int], dict[str, np.ndarray]]
"""Makes the annotations of an image from a generator of its own, the plan of its views and the
epoch.

Each has the same shape and type for every image; a batch holds them stacked, by name.
"""


def annotate_nothing(rng: Generator, plan: ViewPlan, epoch: int) -> dict[str, np.ndarray]:
    """Return no annotations."""
    return {}
