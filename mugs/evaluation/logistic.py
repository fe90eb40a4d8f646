"""Multinomial logistic regression with an L2 penalty on frozen features, without intercept (semi-supervised protocol).

    F(W) = 1/n sum_i cross_entropy(W x_i, y_i) + lambda / (2 n) |W|^2
is what the release minimises with cyanure, and scikit-learn with C = 1 / lambda. Here scipy's L-BFGS does, in double
precision, with value and gradient computed on the device. F is strongly convex with modulus lambda / n, so that
F(W) - min F <= n |gradient|^2 / (2 lambda): where this bound is small enough, the search ends.

n images, D width, K classes.
"""

import logging
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from scipy.optimize import minimize
from torch import Tensor

logger = logging.getLogger(__name__)
MEMORY = 20  # pairs that L-BFGS keeps


class NotConvergedError(RuntimeError):
    """The optimum was not reached within the iterations allowed."""


@dataclass(frozen=True)
class LogisticFit:
    """Weights (K, D), double; objective there, a bound of its distance to the optimum, and the iterations it took."""

    weight: Tensor
    objective: float
    gap: float
    iterations: int


class Objective:
    """Value and gradient of F for one penalty; keeps those of the last point asked for."""

    def __init__(self, features: Tensor, labels: Tensor, num_classes: int, penalty: float) -> None:
        self.features, self.labels = features.double(), labels
        self.shape, self.strength = (num_classes, features.shape[1]), penalty / len(features)
        self.last = np.full(num_classes * features.shape[1], np.nan)
        self.value, self.gap = float("inf"), float("inf")

    def __call__(self, flat: np.ndarray) -> tuple[float, np.ndarray]:
        """F and its gradient at W, both flattened."""
        weight = torch.from_numpy(flat).to(self.features.device).view(self.shape)
        log_share = F.log_softmax(self.features @ weight.T, dim=1)
        loss = F.nll_loss(log_share, self.labels)
        error = log_share.exp_()
        error[torch.arange(len(error), device=error.device), self.labels] -= 1
        gradient = torch.addmm(self.strength * weight, error.T, self.features, alpha=1 / len(error))
        self.value = float(loss + 0.5 * self.strength * weight.square().sum())
        self.gap = float(gradient.square().sum()) / (2 * self.strength)
        self.last = flat.copy()
        return self.value, gradient.flatten().cpu().numpy()


def fit_logistic_regression(
    features: Tensor,
    labels: Tensor,
    *,
    num_classes: int,
    penalty: float,
    start: Tensor | None = None,
    tolerance: float = 1e-4,
    max_iterations: int = 5000,
) -> LogisticFit:
    """Minimise F until the bound of what is missing is below `tolerance` of it, from `start` or from zero.

    Raises ValueError for a penalty that is not positive, NotConvergedError when the iterations are used up.
    """
    if penalty <= 0:
        raise ValueError(f"penalty {penalty}: expected a positive number")
    if not bool(torch.isfinite(features).all()):
        raise ValueError("features are not finite")
    objective = Objective(features, labels, num_classes, penalty)
    first = (
        torch.zeros(objective.shape, dtype=torch.float64) if start is None else start.double().cpu()
    )

    def enough(intermediate_result: Any) -> None:
        if not np.array_equal(objective.last, intermediate_result.x):
            objective(intermediate_result.x)
        if objective.gap <= tolerance * objective.value:
            raise StopIteration

    options = {
        "maxiter": max_iterations,
        "maxfun": 2 * max_iterations,
        "maxcor": MEMORY,
        "ftol": 0.0,
        "gtol": 0.0,
    }
    flat = first.flatten().numpy()
    objective(flat)
    iterations = 0
    if objective.gap > tolerance * objective.value:
        found = minimize(
            objective, flat, jac=True, method="L-BFGS-B", callback=enough, options=options
        )
        flat, iterations = found.x, int(found.nit)
        objective(flat)
    if objective.gap > tolerance * objective.value:
        raise NotConvergedError(
            f"lambda {penalty:g}: after {iterations} iterations the objective {objective.value:.6g} may be "
            f"{objective.gap:.2g} above its minimum, {tolerance:g} of it is allowed"
        )
    weight = torch.from_numpy(flat.copy()).view(objective.shape)
    return LogisticFit(weight, objective.value, objective.gap, iterations)


def top1_accuracy(weight: Tensor, features: Tensor, labels: Tensor) -> float:
    """Accuracy in percent."""
    scores = features.double() @ weight.to(features.device).T
    return 100 * float((scores.argmax(dim=1) == labels).double().mean())
