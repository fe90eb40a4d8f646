"""Annotations for tests of loaders. Workers import this file, so it does without torch."""

import os
import signal

import numpy as np
from numpy.random import Generator

from mugs.data.views.plan import ViewPlan


def annotate_image(rng: Generator, plan: ViewPlan, epoch: int) -> dict[str, np.ndarray]:
    """Two annotations of different shapes and types."""
    return {
        "noise": rng.random((2, 3)),
        "boxes": np.array([crop.box for crop in plan.crops[:2]]),
        "epoch": np.array(epoch),
    }


def annotate_process(rng: Generator, plan: ViewPlan, epoch: int) -> dict[str, np.ndarray]:
    """The process that draws the image."""
    return {"process": np.array(os.getpid())}


def fail(rng: Generator, plan: ViewPlan, epoch: int) -> dict[str, np.ndarray]:
    """Raise an error."""
    raise ZeroDivisionError("in a worker")


def die(rng: Generator, plan: ViewPlan, epoch: int) -> dict[str, np.ndarray]:
    """End the process, as the system does when memory runs out."""
    os.kill(os.getpid(), signal.SIGKILL)
    return {}
