"""Heads of the three levels (paper, section 3), biases and initialization as released."""

from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mugs.models.batch_norm import AllRanksBatchNorm
from mugs.models.config import Activation, HeadNorm, PredictorInit
from mugs.models.vit import init_weights

ACTIVATIONS: dict[Activation, type[nn.Module]] = {"gelu": nn.GELU, "relu": nn.ReLU}


def build_mlp(
    widths: list[int],
    *,
    bias: bool,
    norm: HeadNorm = "none",
    activation: Activation = "gelu",
    norm_output: bool = False,
) -> nn.Sequential:
    """Build Linear layers, between them optional batch normalization and an activation.

    `norm_output` adds a batch normalization without weight and bias at the end.
    """
    *hidden, last = pairwise(widths)
    layers: list[nn.Module] = []
    for inputs, outputs in hidden:
        layers.append(nn.Linear(inputs, outputs, bias=bias))
        if norm == "batch":
            layers.append(AllRanksBatchNorm(outputs))
        layers.append(ACTIVATIONS[activation]())
    layers.append(nn.Linear(*last, bias=bias))
    if norm_output:
        layers.append(AllRanksBatchNorm(widths[-1], affine=False))
    return nn.Sequential(*layers)


class InfoNCEHead(nn.Module):
    """Instance or local-group head: projector and L2 norm; the student adds predictor and L2 norm.

    No layer has a bias (released). The predictor keeps torch's default initialization with
    `predictor_init="released"`; "0.02" draws it like every other layer (M10). No released run has
    batch normalization (`norm="none"`); "batch" puts it into the projector. Without
    `norm_before_predictor` the student's only L2 norm is the one after the predictor (M34).
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
        norm_before_predictor: bool = True,
    ) -> None:
        super().__init__()
        self.norm_before_predictor = norm_before_predictor
        self.projector = build_mlp([width, hidden, hidden, out], bias=False, norm=norm)
        self.projector.apply(init_weights)
        self.predictor: nn.Sequential | None = None
        if predictor_hidden is not None:
            self.predictor = build_mlp([out, predictor_hidden, out], bias=False)
            if predictor_init == "0.02":
                self.predictor.apply(init_weights)

    def forward(self, x: Tensor) -> Tensor:
        """(N, D) -> (N, out), unit length."""
        x = self.projector(x)
        if self.predictor is not None:
            x = self.predictor(F.normalize(x, dim=-1) if self.norm_before_predictor else x)
        return F.normalize(x, dim=-1)


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

    `train_magnitude` is the opposite of the released option `norm_last_layer`. With `second_out`
    there are further prototypes, `last_layer2`, for other tokens than those of `last_layer`.
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
        second_out: int | None = None,
    ) -> None:
        super().__init__()
        self.projector = build_mlp([width, hidden, hidden, bottleneck], bias=True, norm=norm)
        self.projector.apply(init_weights)
        self.last_layer = Prototypes(bottleneck, out, train_magnitude=train_magnitude)
        self.last_layer2: Prototypes | None = None
        if second_out is not None:
            self.last_layer2 = Prototypes(bottleneck, second_out, train_magnitude=train_magnitude)

    @property
    def input_layer(self) -> nn.Linear:
        """Return the first layer."""
        layer = self.projector[0]
        assert isinstance(layer, nn.Linear)
        return layer

    def project(self, x: Tensor) -> Tensor:
        """(N, D) -> (N, bottleneck) of unit length, which the prototypes are applied to."""
        return F.normalize(self.projector(x), dim=-1)

    def forward(self, x: Tensor) -> Tensor:
        """(N, D) -> (N, out)."""
        logits: Tensor = self.last_layer(self.project(x))
        return logits
