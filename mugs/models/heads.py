"""Heads of the three levels (paper, section 3), biases and initialization as released."""

from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mugs.models.batch_norm import AllRanksBatchNorm
from mugs.models.config import HeadNorm, PredictorInit
from mugs.models.vit import init_weights


def build_mlp(widths: list[int], *, bias: bool, norm: HeadNorm = "none") -> nn.Sequential:
    """Build Linear layers, between them GELU and optional batch normalization."""
    *hidden, last = pairwise(widths)
    layers: list[nn.Module] = []
    for inputs, outputs in hidden:
        layers.append(nn.Linear(inputs, outputs, bias=bias))
        if norm == "batch":
            layers.append(AllRanksBatchNorm(outputs))
        layers.append(nn.GELU())
    return nn.Sequential(*layers, nn.Linear(*last, bias=bias))


class InfoNCEHead(nn.Module):
    """Instance or local-group head: projector and L2 norm; the student adds predictor and L2 norm.

    No layer has a bias (released). The predictor keeps torch's default initialization with
    `predictor_init="released"`; "0.02" draws it like every other layer (M10). No released run has
    batch normalization (`norm="none"`); "batch" puts it into the projector.
    """

    def __init__(
        self,
        width: int,
        *,
        hidden: int = 2048,
        out: int = 256,
        predictor_hidden: int | None = None,
        predictor_init: PredictorInit = "released",
        norm: HeadNorm = "none",
    ) -> None:
        super().__init__()
        self.projector = build_mlp([width, hidden, hidden, out], bias=False, norm=norm)
        self.projector.apply(init_weights)
        self.predictor: nn.Sequential | None = None
        if predictor_hidden is not None:
            self.predictor = build_mlp([out, predictor_hidden, out], bias=False)
            if predictor_init == "0.02":
                self.predictor.apply(init_weights)

    def forward(self, x: Tensor) -> Tensor:
        """(N, D) -> (N, out), unit length."""
        x = F.normalize(self.projector(x), dim=-1)
        return x if self.predictor is None else F.normalize(self.predictor(x), dim=-1)


class Prototypes(nn.Module):
    """Weight-normalised Linear without bias: row k is weight_g[k] * weight_v[k] / |weight_v[k]|."""

    def __init__(self, width: int, num: int, *, train_magnitude: bool) -> None:
        super().__init__()
        self.weight_g = nn.Parameter(torch.ones(num, 1), requires_grad=train_magnitude)
        # A Linear is made only for torch's default initialization.
        self.weight_v = nn.Parameter(nn.Linear(width, num, bias=False).weight.detach().clone())

    def forward(self, x: Tensor) -> Tensor:
        """(N, width) -> logits (N, num)."""
        # torch's parametrization would rename weight_g and weight_v in checkpoints.
        return F.linear(x, torch._weight_norm(self.weight_v, self.weight_g, 0))


class GroupHead(nn.Module):
    """Group head: projector with biases, L2 norm, prototypes. Returns raw logits.

    `train_magnitude` is the opposite of the released option `norm_last_layer`.
    """

    def __init__(
        self,
        width: int,
        *,
        hidden: int = 2048,
        bottleneck: int = 256,
        out: int = 65536,
        train_magnitude: bool = True,
        norm: HeadNorm = "none",
    ) -> None:
        super().__init__()
        self.projector = build_mlp([width, hidden, hidden, bottleneck], bias=True, norm=norm)
        self.projector.apply(init_weights)
        self.last_layer = Prototypes(bottleneck, out, train_magnitude=train_magnitude)

    @property
    def input_layer(self) -> nn.Linear:
        """Return the first layer."""
        layer = self.projector[0]
        assert isinstance(layer, nn.Linear)
        return layer

    def forward(self, x: Tensor) -> Tensor:
        """(N, D) -> (N, out)."""
        logits: Tensor = self.last_layer(F.normalize(self.projector(x), dim=-1))
        return logits
