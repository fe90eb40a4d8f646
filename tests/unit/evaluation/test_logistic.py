"""Logistic regression reaches scikit-learn's optimum for every penalty of the released sweep."""

import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from sklearn.linear_model import LogisticRegression
from torch import Tensor

from mugs.data.loading.evaluation import iter_eval_batches
from mugs.data.mini.digits import materialize_digits
from mugs.data.sources.folder import FolderSource
from mugs.data.sources.subset import Subset, draw_class_balanced
from mugs.evaluation.features import build_feature_function, extract_features
from mugs.evaluation.logistic import (
    NotConvergedError,
    Objective,
    fit_logistic_regression,
    top1_accuracy,
)
from mugs.models.vit import build_vit

PENALTIES = (0.3, 0.2, 0.15, 0.1, 0.06, 0.03, 0.01)


@pytest.fixture(scope="module")
def digits(tmp_path_factory: pytest.TempPathFactory) -> FolderSource:
    root = tmp_path_factory.mktemp("digits") / "images"
    materialize_digits(root)
    return FolderSource(root / "train")


def mini_features(source: FolderSource, percent: float) -> tuple[Tensor, Tensor]:
    torch.manual_seed(0)
    model = build_feature_function(build_vit("vit_mini").eval(), "cls")
    part = Subset(source, draw_class_balanced(source, percent, seed=0))
    values, labels, _ = extract_features(
        model, iter_eval_batches(part, resize=32, crop=32, threads=1), device=torch.device("cpu")
    )
    return F.normalize(values - values.mean(dim=0), dim=1), labels


@pytest.mark.parametrize("percent", [1, 10])
def test_optimum_of_scikit_learn_for_every_penalty(digits: FolderSource, percent: float) -> None:
    x, y = mini_features(digits, percent)
    weight = None
    for penalty in PENALTIES:
        ours = fit_logistic_regression(x, y, num_classes=10, penalty=penalty, start=weight)
        weight = ours.weight
        model = LogisticRegression(C=1 / penalty, fit_intercept=False, tol=1e-9, max_iter=10000)
        model.fit(x.double().numpy(), y.numpy())
        theirs, _ = Objective(x, y, 10, penalty)(np.ascontiguousarray(model.coef_).ravel())
        assert ours.objective == pytest.approx(theirs, rel=1e-4)
        assert 0 <= ours.objective - theirs + 1e-9 <= ours.gap + 1e-9  # the bound is one
        assert top1_accuracy(weight, x, y) == pytest.approx(
            100 * model.score(x.double().numpy(), y.numpy()), abs=0.7
        )


def test_gradient_is_that_of_the_objective(digits: FolderSource) -> None:
    x, y = mini_features(digits, 1)
    objective, point = Objective(x, y, 10, 0.1), np.random.default_rng(0).normal(size=960)
    _, gradient = objective(point)
    for index in (0, 17, 959):
        step = np.zeros(960)
        step[index] = 1e-6
        slope = (objective(point + step)[0] - objective(point - step)[0]) / 2e-6
        assert slope == pytest.approx(gradient[index], abs=1e-8)


def test_a_started_search_ends_where_a_new_one_does(digits: FolderSource) -> None:
    x, y = mini_features(digits, 1)
    far = torch.full((10, 96), 3.0)
    one, other = (
        fit_logistic_regression(x, y, num_classes=10, penalty=0.1, start=s, tolerance=1e-10)
        for s in (None, far)
    )
    torch.testing.assert_close(one.weight, other.weight, atol=1e-3, rtol=0)
    again = fit_logistic_regression(
        x, y, num_classes=10, penalty=0.1, start=one.weight, tolerance=1e-6
    )
    assert again.iterations == 0 and torch.equal(again.weight, one.weight)


@pytest.mark.parametrize(
    ("scale", "penalty", "error", "words"),
    [
        (1.0, 0.01, NotConvergedError, r"0.01: after 2 iterations the objective .* 0.0001 of it"),
        (1.0, 0, ValueError, "penalty 0: expected a positive number"),
        (math.nan, 1, ValueError, "features are not finite"),
    ],
)
def test_what_does_not_work_is_said(
    digits: FolderSource, scale: float, penalty: float, error: type[Exception], words: str
) -> None:
    x, y = mini_features(digits, 1)
    with pytest.raises(error, match=words):
        fit_logistic_regression(x * scale, y, num_classes=10, penalty=penalty, max_iterations=2)
