"""Backbone with a classifier on its class token, and its parameter groups."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from mugs.engine.layer_decay import build_layer_decay_groups
from mugs.finetune.config import HeadOptions
from mugs.models.vit import ViT


class ImageClassifier(nn.Module):
    """Images (N, 3, H, W) -> logits (N, C), from the class token after the final norm."""

    def __init__(self, backbone: ViT, head: nn.Module) -> None:
        super().__init__()
        self.backbone, self.head = backbone, head

    def forward(self, images: Tensor) -> Tensor:
        """Logits."""
        logits: Tensor = self.head(self.backbone.cls_feature(images))
        return logits


def build_head(options: HeadOptions, width: int, num_classes: int, seed: int) -> nn.Module:
    """A new head, its weights a function of the seed."""
    wide = [width] if options.kind == "linear" else [width, options.hidden]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        layers = [
            build_linear_layer(n, m) for n, m in zip(wide, [*wide[1:], num_classes], strict=True)
        ]
    with torch.no_grad():
        layers[-1].weight.mul_(options.scale)
    return layers[0] if len(layers) == 1 else nn.Sequential(layers[0], nn.GELU(), layers[1])


def build_linear_layer(inputs: int, outputs: int) -> nn.Linear:
    """Linear layer with weights N(0, 0.02) cut at +-2 and bias 0."""
    layer = nn.Linear(inputs, outputs)
    nn.init.trunc_normal_(layer.weight, std=0.02)
    nn.init.zeros_(layer.bias)
    return layer


def load_first_layer(head: nn.Module, state: Mapping[str, Tensor]) -> None:
    """Weight and bias of a linear layer into the first layer of a head. Raises ValueError where the shapes differ."""
    first = next(head.children())
    assert isinstance(first, nn.Linear)
    wanted, found = tuple(first.weight.shape), tuple(state["weight"].shape)
    if wanted != found:
        raise ValueError(
            f"head.init pretrained: the projection is {found}, head.hidden asks for {wanted}"
        )
    first.load_state_dict(state)


def build_parameter_groups(model: ImageClassifier, layer_decay: float) -> list[dict[str, Any]]:
    """Groups by layer; class token and position table have no weight decay, nor have tensors of one dimension."""
    vit = model.backbone
    return build_layer_decay_groups(
        model, vit, layer_decay, no_weight_decay=(vit.cls_token, vit.pos_embed)
    )
