"""Backbone with a classifier on its class token, and the layer-wise parameter groups."""

import re
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from mugs.backbones.vit import ViT
from mugs.finetune.config import HeadOptions


class Classifier(nn.Module):
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
        layers = [new_linear(n, m) for n, m in zip(wide, [*wide[1:], num_classes], strict=True)]
    with torch.no_grad():
        layers[-1].weight.mul_(options.scale)
    return layers[0] if len(layers) == 1 else nn.Sequential(layers[0], nn.GELU(), layers[1])


def new_linear(inputs: int, outputs: int) -> nn.Linear:
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
        raise ValueError(f"head.init pretrained: the projection is {found}, head.hidden asks for {wanted}")
    first.load_state_dict(state)


def level(name: str, depth: int) -> int:
    """Level of a parameter: 0 for embeddings, class token and positions, i + 1 for block i, depth + 1 for the rest."""
    if re.match(r"backbone\.(cls_token|pos_embed|patch_embed)", name):
        return 0
    block = re.match(r"backbone\.blocks\.(\d+)\.", name)
    return depth + 1 if block is None else int(block.group(1)) + 1


def parameter_groups(model: Classifier, layer_decay: float) -> list[dict[str, Any]]:
    """Groups by level, with rate scale layer_decay^(depth + 1 - level), and by whether they decay.

    Without decay: biases, tensors of one dimension, class token and position table.
    Differs from timm's `param_groups_layer_decay`: there the final norm has the level of the last block.
    """
    depth = len(model.backbone.blocks)
    groups: dict[tuple[int, bool], list[nn.Parameter]] = {}
    for name, parameter in model.named_parameters():
        plain = parameter.ndim == 1 or name.endswith((".bias", "cls_token", "pos_embed"))
        groups.setdefault((level(name, depth), plain), []).append(parameter)
    return [
        {
            "params": parameters,
            "lr_scale": layer_decay ** (depth + 1 - number),
            "decay": not plain,
            "weight_decay": 0.0,
        }
        for (number, plain), parameters in groups.items()
    ]
