"""Many linear classifiers trained on the same features as batched matrices, each with its rate, decay and optimizer.

C classifiers, K classes, D width, B batch. Classes come first in every tensor: then one product gives all scores and
one all gradients, and the softmax over classes runs over long contiguous rows.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

LARS_COEFFICIENT = 1e-3  # trust coefficient of You et al., arXiv 1708.03888, as MoCo-v3 uses it
VALIDATION_BYTES = 1 << 28
NAMES = ("weight", "bias", "weight_momentum", "bias_momentum")


@dataclass(frozen=True)
class Setting:
    """How one classifier is trained; the rate is for 256 images."""

    base_lr: float
    weight_decay: float = 0.0
    optimizer: Literal["sgd", "lars"] = "sgd"

    def __str__(self) -> str:
        return f"lr {self.base_lr:g}, weight decay {self.weight_decay:g}, {self.optimizer.upper()}"


class LinearClassifiers:
    """Linear classifiers with momentum, all from the same N(0, 0.01) weights and zero bias, a group per optimizer."""

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
        start = (
            torch.randn(num_classes, width, generator=torch.Generator().manual_seed(seed)) * 0.01
        )
        decays = {
            kind: [s.weight_decay for s in settings if s.optimizer == kind]
            for kind in ("sgd", "lars")
        }
        kinds: dict[str, type[ClassifierGroup]] = {"sgd": SgdGroup, "lars": LarsGroup}
        self.num = len(settings)
        self.groups = [
            kinds[kind](start.to(device), decay, momentum)
            for kind, decay in decays.items()
            if decay
        ]
        self.sizes = [len(decay) for decay in decays.values() if decay]
        self.classes = torch.arange(num_classes, device=device)
        self.empty = ClassifierGroup(start.to(device), [], momentum).tensors

    @property
    def tensors(self) -> dict[str, Tensor]:
        """Copies of weights (C, K, D), biases (C, K) and their momenta."""
        parts = [self.empty, *(group.tensors for group in self.groups)]
        return {name: torch.cat([part[name].transpose(0, 1) for part in parts]) for name in NAMES}

    def load(self, tensors: Mapping[str, Tensor]) -> None:
        """Take over what `tensors` gave."""
        for name in NAMES:
            for group, part in zip(
                self.groups, torch.split(tensors[name], self.sizes), strict=True
            ):
                group.tensors[name].copy_(part.transpose(0, 1))

    def update(self, features: Tensor, labels: Tensor, rates: Tensor) -> Tensor:
        """One step on features (B, D) and labels (B,) at learning rates (C,); returns the losses (C,) before it."""
        wanted = (self.classes[:, None] == labels).to(features.dtype)[:, None]
        parts = zip(self.groups, torch.split(rates, self.sizes), strict=True)
        return torch.cat(
            [rates[:0], *(group.update(features, labels, wanted, some) for group, some in parts)]
        )

    def accuracy(self, features: Tensor, labels: Tensor) -> Tensor:
        """Top-1 and top-5 in percent, (C, 2); a score equal to the right one, or not a number, counts against it."""
        hits = torch.zeros(self.num, 2, dtype=torch.float64, device=features.device)
        rows = VALIDATION_BYTES // (4 * max(1, self.num * len(self.classes))) + 1
        for some, wanted in zip(
            torch.split(features, rows), torch.split(labels, rows), strict=True
        ):
            for group, mine in zip(self.groups, torch.split(hits, self.sizes), strict=True):
                mine += group.hits(some, wanted)
        return 100 * hits / len(labels)


class ClassifierGroup:
    """Classifiers of one optimizer; each step is done in place, in memory taken once."""

    def __init__(self, start: Tensor, decay: Sequence[float], momentum: float) -> None:
        self.momentum = momentum
        self.weight = start[:, None].repeat(1, len(decay), 1)  # (K, C, D)
        self.bias = torch.zeros(self.weight.shape[:2], device=start.device)
        self.weight_momentum, self.bias_momentum = (
            torch.zeros_like(self.weight),
            torch.zeros_like(self.bias),
        )
        self.decay = torch.tensor(decay, device=start.device) if any(decay) else None
        self.room = start.new_empty(0)  # for scores

    @property
    def tensors(self) -> dict[str, Tensor]:
        """Weights (K, C, D), biases (K, C) and their momenta."""
        return {name: getattr(self, name) for name in NAMES}

    def scores(self, features: Tensor) -> Tensor:
        """Features (B, D) -> (K, C, B)."""
        if self.room.numel() < self.bias.numel() * len(features):
            self.room = features.new_empty(self.bias.numel() * len(features))
        found = self.room[: self.bias.numel() * len(features)].view(-1, len(features))
        torch.mm(self.weight.flatten(0, 1), features.T, out=found)
        return found.view(*self.bias.shape, len(features)).add_(self.bias[..., None])

    def update(self, features: Tensor, labels: Tensor, wanted: Tensor, rates: Tensor) -> Tensor:
        """A step; `wanted` (K, 1, B) is 1 at the labels."""
        scores = self.scores(features)
        scores.sub_(scores.amax(dim=0))
        right = scores.gather(0, labels.expand(1, scores.shape[1], -1)).squeeze(0)
        total = scores.exp_().sum(dim=0)
        losses = (total.log() - right).mean(dim=1)
        self.descend(scores.div_(total).sub_(wanted), features)
        self.weight.addcmul_(self.weight_momentum, rates[:, None], value=-1)
        self.bias.addcmul_(self.bias_momentum, rates, value=-1)
        return losses

    def descend(self, error: Tensor, features: Tensor) -> None:
        """Move the momenta on; error (K, C, B) is B times the gradient of the loss by the scores."""
        raise NotImplementedError

    def hits(self, features: Tensor, labels: Tensor) -> Tensor:
        """How many of the right classes score first, and among the first five, (C, 2)."""
        scores = self.scores(features)
        right = scores.gather(0, labels.expand(1, scores.shape[1], -1))
        rank = len(scores) - 1 - (scores < right).sum(dim=0).masked_fill_(right[0].isnan(), -5)
        return torch.stack([(rank < 1).sum(dim=1), (rank < 5).sum(dim=1)], dim=1)


class SgdGroup(ClassifierGroup):
    """SGD decays weights and bias, as torch does; the gradient goes straight into the momentum."""

    def descend(self, error: Tensor, features: Tensor) -> None:
        """momentum * m + gradient + decay * w."""
        scale = 1 / len(features)
        self.weight_momentum.flatten(0, 1).addmm_(
            error.flatten(0, 1), features, beta=self.momentum, alpha=scale
        )
        self.bias_momentum.mul_(self.momentum).add_(error.sum(dim=2), alpha=scale)
        if self.decay is not None:
            self.weight_momentum.addcmul_(self.weight, self.decay[:, None])
            self.bias_momentum.addcmul_(self.bias, self.decay)


class LarsGroup(ClassifierGroup):
    """LARS scales the decayed gradient of a classifier's weights by 0.001 |w| / |gradient|, and leaves its bias."""

    def __init__(self, start: Tensor, decay: Sequence[float], momentum: float) -> None:
        super().__init__(start, decay, momentum)
        self.gradient = torch.empty_like(self.weight)

    def descend(self, error: Tensor, features: Tensor) -> None:
        """momentum * m + trust * (gradient + decay * w), the gradient B times what it is until the last step."""
        scale, gradient = 1 / len(features), self.gradient
        torch.mm(error.flatten(0, 1), features, out=gradient.flatten(0, 1))
        if self.decay is not None:
            gradient.addcmul_(self.weight, self.decay[:, None], value=len(features))
        sizes = [tensor.norm(dim=2).norm(dim=0) for tensor in (self.weight, gradient)]
        trust = torch.where(
            (sizes[0] > 0) & (sizes[1] > 0), LARS_COEFFICIENT * sizes[0] / sizes[1], scale
        )
        self.weight_momentum.mul_(self.momentum).addcmul_(gradient, trust[:, None])
        self.bias_momentum.mul_(self.momentum).add_(error.sum(dim=2), alpha=scale)
