"""Whether frozen features collapsed, and whether labels belong to them.

Shapes: N images, D width of a feature.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

NEIGHBORS = 5


@dataclass(frozen=True)
class FeatureHealth:
    """Figures of a set of features that tell a collapsed network from a trained one."""

    # exp of the entropy of the singular values' shares: D if all directions are used alike.
    effective_rank: float
    mean_cosine: float
    mean_norm: float


@dataclass(frozen=True)
class LabelAgreement:
    """Shares of images, in percent, whose nearest others have the same label."""

    # Within a split an image is no neighbor of its own.
    within_train: float
    within_val: float
    from_train_to_val: float
    # What the most frequent label would get.
    chance: float
    # Of the smaller split, in images.
    images: int


def measure_health(features: Tensor) -> FeatureHealth:
    """Return the figures of features (N, D), N at least 2."""
    features = features.double()
    # Roy and Vetterli, "The effective rank", EUSIPCO 2007; about the mean, which is no information.
    values = torch.linalg.svdvals(features - features.mean(dim=0))
    shares = values / values.sum().clamp_min(1e-300)
    entropy = -(shares * shares.clamp_min(1e-300).log()).sum()
    unit = F.normalize(features, dim=-1)
    count = len(unit)
    # The sum over all pairs is the squared length of the sum; each image with itself gives 1.
    cosine = (unit.sum(dim=0).square().sum() - count) / (count * (count - 1))
    return FeatureHealth(
        effective_rank=float(entropy.exp()),
        mean_cosine=float(cosine),
        mean_norm=float(features.norm(dim=-1).mean()),
    )


def measure_label_agreement(
    train: Tensor, train_labels: Tensor, val: Tensor, val_labels: Tensor
) -> LabelAgreement:
    """Return how far the labels of two splits agree with the features, and with each other.

    Labels that were shuffled agree with nothing; those of a split whose classes have other numbers
    agree within it, and not with the other split.
    """
    classes = int(torch.cat([train_labels, val_labels]).max()) + 1
    most = max(
        float(torch.bincount(labels).max()) / len(labels) for labels in (train_labels, val_labels)
    )
    return LabelAgreement(
        within_train=_share_of_right(train, train_labels, train, train_labels, classes, same=True),
        within_val=_share_of_right(val, val_labels, val, val_labels, classes, same=True),
        from_train_to_val=_share_of_right(
            train, train_labels, val, val_labels, classes, same=False
        ),
        chance=100 * most,
        images=min(len(train_labels), len(val_labels)),
    )


def _share_of_right(
    bank: Tensor, bank_labels: Tensor, queries: Tensor, labels: Tensor, classes: int, *, same: bool
) -> float:
    cosine = F.normalize(queries.float(), dim=-1) @ F.normalize(bank.float(), dim=-1).T
    if same:
        cosine.fill_diagonal_(-torch.inf)
    nearest = cosine.topk(min(NEIGHBORS, cosine.shape[1] - same), dim=1)
    votes = torch.zeros(len(queries), classes)
    # Cosines decide between classes with as many neighbors, and never against more of them.
    votes.scatter_add_(1, bank_labels[nearest.indices], 10 + nearest.values)
    return 100 * float((votes.argmax(dim=1) == labels).float().mean())
