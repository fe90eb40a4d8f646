"""Multinomial logistic regression with an L2 penalty on frozen features, without intercept.

    F(W) = 1/n sum_i cross_entropy(W x_i, y_i) + lambda / (2 n) |W|^2

This is the objective of the released semi-supervised protocol, which minimizes it with cyanure, and
of scikit-learn with C = 1 / lambda. Here scipy's L-BFGS does, in double precision, with value and
gradient computed on the device.

F is strongly convex with modulus lambda / n, hence F(W) - min F <= n |gradient|^2 / (2 lambda). The
search ends when this bound is small enough, so its result does not depend on the solver.

Shapes: n images, D width, K classes.
"""

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from scipy.optimize import minimize
from torch import Tensor

MEMORY = 20  # pairs of steps and gradient changes that L-BFGS keeps


class NotConvergedError(RuntimeError):
    """The optimum was not reached within the iterations allowed."""


@dataclass(frozen=True)
class LogisticFit:
    """Weights (K, D) in double precision, and how good they are.

    gap: an upper bound of `objective` minus the minimum.
    """

    weight: Tensor
    objective: float
    gap: float
    iterations: int


class Objective:
    """Value and gradient of F for one penalty; remembers those of the last point."""

    def __init__(self, features: Tensor, labels: Tensor, num_classes: int, penalty: float) -> None:
        self.features = features.double()
        self.labels = labels
        self.shape = (num_classes, features.shape[1])
        self.strength = penalty / len(features)
        self.last_point = np.full(num_classes * features.shape[1], np.nan)
        self.value = float("inf")
        self.gap = float("inf")

    def __call__(self, flat: np.ndarray) -> tuple[float, np.ndarray]:
        """Return F and its gradient at W, both flattened."""
        weight = torch.from_numpy(flat).to(self.features.device).view(self.shape)
        log_softmax = F.log_softmax(self.features @ weight.T, dim=1)
        loss = F.nll_loss(log_softmax, self.labels)

        # Gradient by the scores, without autograd: softmax minus one-hot label. In place, because
        # (n, K) doubles are the largest tensor here.
        error = log_softmax.exp_()
        error[torch.arange(len(error), device=error.device), self.labels] -= 1
        gradient = torch.addmm(self.strength * weight, error.T, self.features, alpha=1 / len(error))

        self.value = float(loss + 0.5 * self.strength * weight.square().sum())
        self.gap = float(gradient.square().sum()) / (2 * self.strength)
        self.last_point = flat.copy()
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
    """Minimize F from `start` (or zero) until the gap is below `tolerance` times F.

    Raises:
        ValueError: The penalty is not positive, or features are not finite.
        NotConvergedError: The iterations are used up.
    """
    if penalty <= 0:
        raise ValueError(f"penalty {penalty}: expected a positive number")
    if not bool(torch.isfinite(features).all()):
        raise ValueError("features are not finite")
    objective = Objective(features, labels, num_classes, penalty)
    if start is None:
        start = torch.zeros(objective.shape)

    # scipy recognizes this kind of callback by the name of its parameter.
    def stop_when_close(intermediate_result: Any) -> None:
        # The accepted point need not be the last one evaluated: a line search may try points
        # beyond it. Then the gap belongs to another point and is computed again.
        if not np.array_equal(objective.last_point, intermediate_result.x):
            objective(intermediate_result.x)
        if objective.gap <= tolerance * objective.value:
            raise StopIteration

    flat = start.double().cpu().flatten().numpy()
    objective(flat)
    iterations = 0
    # scipy calls back after an iteration only. A start that is good enough needs none.
    if objective.gap > tolerance * objective.value:
        found = minimize(
            objective,
            flat,
            jac=True,
            method="L-BFGS-B",
            callback=stop_when_close,
            # scipy's own criteria are switched off: only the gap decides.
            options={
                "maxiter": max_iterations,
                "maxfun": 2 * max_iterations,
                "maxcor": MEMORY,
                "ftol": 0.0,
                "gtol": 0.0,
            },
        )
        flat = found.x
        iterations = int(found.nit)
        objective(flat)
    if objective.gap > tolerance * objective.value:
        raise NotConvergedError(
            f"lambda {penalty:g}: after {iterations} iterations the objective "
            f"{objective.value:.6g} may be {objective.gap:.2g} above its minimum, "
            f"{tolerance:g} of it is allowed"
        )
    return LogisticFit(
        torch.from_numpy(flat.copy()).view(objective.shape),
        objective.value,
        objective.gap,
        iterations,
    )


def top1_accuracy(weight: Tensor, features: Tensor, labels: Tensor) -> float:
    """Return the accuracy in percent of weights (K, D) on features (n, D)."""
    predicted = (features.double() @ weight.to(features.device).T).argmax(dim=1)
    return 100 * float((predicted == labels).double().mean())
