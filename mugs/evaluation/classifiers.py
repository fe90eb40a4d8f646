"""Many linear classifiers trained on the same features as batched matrices, each with its rate, decay and optimizer.

C classifiers, K classes, D width, B batch.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

LARS_COEFFICIENT = 1e-3  # trust coefficient of You et al., arXiv 1708.03888, as MoCo-v3 uses it
VALIDATION_BYTES = 1 << 28


@dataclass(frozen=True)
class Setting:
    """How one classifier is trained; the rate is for 256 images."""

    base_lr: float
    weight_decay: float = 0.0
    optimizer: Literal["sgd", "lars"] = "sgd"

    def __str__(self) -> str:
        return f"lr {self.base_lr:g}, weight decay {self.weight_decay:g}, {self.optimizer.upper()}"


class Classifiers:
    """C linear classifiers with momentum, all from the same N(0, 0.01) weights and zero bias.

    SGD decays weights and bias, as torch does. LARS scales the decayed gradient of the weights of a classifier by
    0.001 |w| / |gradient|, and leaves its bias alone. One product serves all scores, one all gradients; they are
    written out, since the gradient of SGD then goes straight into its momentum.
    """

    def __init__(
        self,
        settings: Sequence[Setting],
        width: int,
        num_classes: int,
        *,
        seed: int,
        momentum: float,
        device: torch.device,
    ) -> None:
        if sorted(settings, key=lambda s: s.optimizer == "lars") != list(settings):
            raise ValueError("classifiers of SGD have to come before those of LARS")
        self.num, self.num_classes, self.momentum = len(settings), num_classes, momentum
        self.num_sgd = sum(s.optimizer == "sgd" for s in settings)
        start = torch.randn(num_classes, width, generator=torch.Generator().manual_seed(seed)) * 0.01
        self.weight = start.to(device).repeat(self.num, 1, 1)  # (C, K, D)
        self.bias = torch.zeros(self.num, num_classes, device=device)
        self.weight_momentum, self.bias_momentum = torch.zeros_like(self.weight), torch.zeros_like(self.bias)
        decay = torch.tensor([s.weight_decay for s in settings], device=device)
        self.decay = decay[:, None] if bool(decay.any()) else None

    @property
    def tensors(self) -> dict[str, Tensor]:
        """Weights, biases and momenta, an entry per classifier."""
        names = ("weight", "bias", "weight_momentum", "bias_momentum")
        return {name: getattr(self, name) for name in names}

    def update(self, features: Tensor, labels: Tensor, rates: Tensor) -> Tensor:
        """One step on features (B, D) and labels (B,) at learning rates (C,); returns the losses (C,) before it."""
        scores = self._scores(features)
        target = labels.view(-1, 1, 1).expand(-1, self.num, 1)
        log_share = F.log_softmax(scores, dim=-1)
        losses = -log_share.gather(2, target).squeeze(2).mean(dim=0)
        error = log_share.exp_().scatter_add_(2, target, -torch.ones_like(target, dtype=scores.dtype))
        error.div_(len(features))
        self._sgd(error[:, : self.num_sgd], features)
        self._lars(error[:, self.num_sgd :], features)
        self.weight.addcmul_(self.weight_momentum, rates[:, None, None], value=-1)
        self.bias.addcmul_(self.bias_momentum, rates[:, None], value=-1)
        return losses

    def _scores(self, features: Tensor) -> Tensor:
        """Features (B, D) -> (B, C, K)."""
        scores = torch.addmm(self.bias.flatten(), features, self.weight.flatten(0, 1).T)
        return scores.view(len(features), self.num, self.num_classes)

    def _sgd(self, error: Tensor, features: Tensor) -> None:
        """Momentum of the classifiers of SGD: momentum * m + gradient + decay * w; error (B, C', K)."""
        mine = slice(0, self.num_sgd)
        self.weight_momentum[mine].flatten(0, 1).addmm_(error.flatten(1).T, features, beta=self.momentum)
        self.bias_momentum[mine].mul_(self.momentum).add_(error.sum(dim=0))
        if self.decay is not None:
            self.weight_momentum[mine].addcmul_(self.weight[mine], self.decay[mine, :, None])
            self.bias_momentum[mine].addcmul_(self.bias[mine], self.decay[mine])

    def _lars(self, error: Tensor, features: Tensor) -> None:
        """Momentum of the classifiers of LARS; error (B, C', K)."""
        mine = slice(self.num_sgd, None)
        weight = self.weight[mine]
        gradient = (error.flatten(1).T @ features).view_as(weight)
        if self.decay is not None:
            gradient.addcmul_(weight, self.decay[mine, :, None])
        sizes = [t.flatten(1).norm(dim=1) for t in (weight, gradient)]
        trust = torch.where((sizes[0] > 0) & (sizes[1] > 0), LARS_COEFFICIENT * sizes[0] / sizes[1], 1.0)
        self.weight_momentum[mine].mul_(self.momentum).addcmul_(gradient, trust[:, None, None])
        self.bias_momentum[mine].mul_(self.momentum).add_(error.sum(dim=0))

    def accuracy(self, features: Tensor, labels: Tensor) -> Tensor:
        """Top-1 and top-5 in percent, (C, 2); a score equal to the right one, or not a number, counts against it."""
        hits = torch.zeros(self.num, 2, dtype=torch.float64, device=features.device)
        rows = VALIDATION_BYTES // (4 * max(1, self.bias.numel())) + 1
        for some, wanted in zip(torch.split(features, rows), torch.split(labels, rows), strict=True):
            scores = self._scores(some)
            right = scores.gather(2, wanted.view(-1, 1, 1).expand(-1, self.num, 1))
            rank = self.num_classes - 1 - (scores < right).sum(dim=2).masked_fill_(right.isnan().squeeze(2), -5)
            hits += torch.stack([(rank < 1).sum(dim=0), (rank < 5).sum(dim=0)], dim=1)
        return 100 * hits / len(labels)
