"""Many linear classifiers trained together on the same features, as batched matrices.

Each classifier has its own learning rate, weight decay and optimizer.

Shapes: C classifiers, K classes, D width, B batch. Classes come first in every tensor: one matrix
product then gives all scores, one gives all gradients, and the softmax over classes runs over long
contiguous rows.
"""

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from mugs.evaluation.config import Setting

LARS_COEFFICIENT = 1e-3  # trust coefficient of You et al., arXiv 1708.03888, as MoCo-v3 uses it
VALIDATION_BYTES = 1 << 28  # of scores at a time
STATE_NAMES = ("weight", "bias", "weight_momentum", "bias_momentum")


class LinearClassifiers:
    """Linear classifiers with momentum, in one group per optimizer.

    All start from the same weights N(0, 0.01) and zero bias.
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
        # The classifiers of a group lie side by side, so that a group is a slice of every tensor.
        if sorted(settings, key=lambda s: s.optimizer == "lars") != list(settings):
            raise ValueError("classifiers of SGD have to come before those of LARS")
        # Drawn on the CPU: a GPU's generator gives other numbers for the same seed.
        generator = torch.Generator().manual_seed(seed)
        start = (torch.randn(num_classes, width, generator=generator) * 0.01).to(device)

        self.num = len(settings)
        self.groups: list[ClassifierGroup] = []
        self.sizes: list[int] = []
        for optimizer, group_class in (("sgd", SgdGroup), ("lars", LarsGroup)):
            decays = [s.weight_decay for s in settings if s.optimizer == optimizer]
            if decays:
                self.groups.append(group_class(start, decays, momentum))
                self.sizes.append(len(decays))
        self.classes = torch.arange(num_classes, device=device)
        # A rank may have no classifier. Its tensors then have the right shapes, with C = 0.
        self.empty = ClassifierGroup(start, [], momentum).tensors

    @property
    def tensors(self) -> dict[str, Tensor]:
        """Copies of weights (C, K, D), biases (C, K) and their momenta."""
        parts = [self.empty, *(group.tensors for group in self.groups)]
        return {
            name: torch.cat([part[name].transpose(0, 1) for part in parts]) for name in STATE_NAMES
        }

    def load(self, tensors: Mapping[str, Tensor]) -> None:
        """Take over what `tensors` returned."""
        for name in STATE_NAMES:
            for group, part in zip(
                self.groups, torch.split(tensors[name], self.sizes), strict=True
            ):
                group.tensors[name].copy_(part.transpose(0, 1))

    def update(self, features: Tensor, labels: Tensor, rates: Tensor) -> Tensor:
        """Make one step on features (B, D) and labels (B,) at learning rates (C,).

        Returns the losses (C,) before the step.
        """
        one_hot = (self.classes[:, None] == labels).to(features.dtype)[:, None]
        losses = [rates[:0]]  # for a rank without classifiers
        for group, group_rates in zip(self.groups, torch.split(rates, self.sizes), strict=True):
            losses.append(group.update(features, labels, one_hot, group_rates))
        return torch.cat(losses)

    def accuracy(self, features: Tensor, labels: Tensor) -> Tensor:
        """Return top-1 and top-5 in percent, (C, 2).

        A class whose score ties with that of the label, and a score that is not a number, count
        against the classifier.
        """
        hits = torch.zeros(self.num, 2, dtype=torch.float64, device=features.device)
        rows = VALIDATION_BYTES // (4 * max(1, self.num * len(self.classes))) + 1
        batches = zip(torch.split(features, rows), torch.split(labels, rows), strict=True)
        for some_features, some_labels in batches:
            for group, own_hits in zip(self.groups, torch.split(hits, self.sizes), strict=True):
                own_hits += group.count_hits(some_features, some_labels)
        return 100 * hits / len(labels)


class ClassifierGroup:
    """Classifiers of one optimizer; each step is made in place, in memory allocated once."""

    def __init__(self, start: Tensor, decays: Sequence[float], momentum: float) -> None:
        self.momentum = momentum
        self.weight = start[:, None].repeat(1, len(decays), 1)  # (K, C, D)
        self.bias = torch.zeros(self.weight.shape[:2], device=start.device)
        self.weight_momentum = torch.zeros_like(self.weight)
        self.bias_momentum = torch.zeros_like(self.bias)
        self.decay = torch.tensor(decays, device=start.device) if any(decays) else None
        self.score_buffer = start.new_empty(0)

    @property
    def tensors(self) -> dict[str, Tensor]:
        """Weights (K, C, D), biases (K, C) and their momenta."""
        return {name: getattr(self, name) for name in STATE_NAMES}

    def scores(self, features: Tensor) -> Tensor:
        """Return the scores (K, C, B) of features (B, D); the next call overwrites them."""
        size = self.bias.numel() * len(features)
        if self.score_buffer.numel() < size:
            self.score_buffer = features.new_empty(size)
        flat = self.score_buffer[:size].view(-1, len(features))
        torch.mm(self.weight.flatten(0, 1), features.T, out=flat)
        return flat.view(*self.bias.shape, len(features)).add_(self.bias[..., None])

    def update(self, features: Tensor, labels: Tensor, one_hot: Tensor, rates: Tensor) -> Tensor:
        """Make one step and return the losses (C,) before it; `one_hot` is (K, 1, B)."""
        # Softmax and cross-entropy by hand and in place: autograd would keep several copies of the
        # scores, which are the largest tensor here.
        scores = self.scores(features)
        scores.sub_(scores.amax(dim=0))
        label_scores = scores.gather(0, labels.expand(1, scores.shape[1], -1)).squeeze(0)
        total = scores.exp_().sum(dim=0)

        # The gradient by the scores is (softmax - one hot) / B.
        self.update_momentum(scores.div_(total).sub_(one_hot), features)
        self.weight.addcmul_(self.weight_momentum, rates[:, None], value=-1)
        self.bias.addcmul_(self.bias_momentum, rates, value=-1)
        return (total.log() - label_scores).mean(dim=1)

    def update_momentum(self, error: Tensor, features: Tensor) -> None:
        """Move the momenta on.

        error (K, C, B) is B times the gradient of the loss by the scores.
        """
        raise NotImplementedError

    def count_hits(self, features: Tensor, labels: Tensor) -> Tensor:
        """Count the labels that score first and among the first five, (C, 2)."""
        scores = self.scores(features)
        label_scores = scores.gather(0, labels.expand(1, scores.shape[1], -1))
        # Rank = number of other classes that do not score strictly less. Comparisons with NaN are
        # false, so NaN scores of other classes rank before the label. A NaN score of the label
        # itself gives K - 1 as well, which is below 5 when there are few classes: hence -5.
        num_lower = (scores < label_scores).sum(dim=0).masked_fill_(label_scores[0].isnan(), -5)
        rank = len(scores) - 1 - num_lower
        return torch.stack([(rank < 1).sum(dim=1), (rank < 5).sum(dim=1)], dim=1)


class SgdGroup(ClassifierGroup):
    """SGD, with weight decay on weights and bias as in torch."""

    def update_momentum(self, error: Tensor, features: Tensor) -> None:
        """Set m to momentum * m + gradient + decay * w."""
        scale = 1 / len(features)
        # The product that makes the gradient adds it to the momentum: no tensor for the gradient.
        self.weight_momentum.flatten(0, 1).addmm_(
            error.flatten(0, 1), features, beta=self.momentum, alpha=scale
        )
        self.bias_momentum.mul_(self.momentum).add_(error.sum(dim=2), alpha=scale)
        if self.decay is not None:
            self.weight_momentum.addcmul_(self.weight, self.decay[:, None])
            self.bias_momentum.addcmul_(self.bias, self.decay)


class LarsGroup(ClassifierGroup):
    """LARS: the decayed gradient of the weights, scaled by 0.001 |w| / |gradient|.

    The bias is neither decayed nor scaled. Source: MoCo-v3.
    """

    def __init__(self, start: Tensor, decays: Sequence[float], momentum: float) -> None:
        super().__init__(start, decays, momentum)
        self.gradient = torch.empty_like(self.weight)

    def update_momentum(self, error: Tensor, features: Tensor) -> None:
        """Set m to momentum * m + trust * (gradient + decay * w)."""
        # `gradient` is B times the gradient: the norms cancel the factor, or `scale` does where
        # the trust ratio does not apply. This saves one pass over the tensor.
        scale = 1 / len(features)
        torch.mm(error.flatten(0, 1), features, out=self.gradient.flatten(0, 1))
        if self.decay is not None:
            self.gradient.addcmul_(self.weight, self.decay[:, None], value=len(features))

        # Norms over classes and width, of each classifier (C,).
        weight_norm, gradient_norm = (
            tensor.norm(dim=2).norm(dim=0) for tensor in (self.weight, self.gradient)
        )
        trust = torch.where(
            (weight_norm > 0) & (gradient_norm > 0),
            LARS_COEFFICIENT * weight_norm / gradient_norm,
            scale,
        )
        self.weight_momentum.mul_(self.momentum).addcmul_(self.gradient, trust[:, None])
        self.bias_momentum.mul_(self.momentum).add_(error.sum(dim=2), alpha=scale)
