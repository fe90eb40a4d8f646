"""A backbone with a classification head on its class token, and its parameter groups."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from mugs.engine.layer_decay import build_layer_decay_groups
from mugs.finetune.config import HeadOptions
from mugs.models.vit import ViT, init_weights


class ImageClassifier(nn.Module):
    """Maps images (N, 3, H, W) to logits (N, C), from the class token after the final norm."""

    def __init__(self, backbone: ViT, head: nn.Module) -> None:
        super().__init__()
        self.backbone = backbone
        self.head = head

    def forward(self, images: Tensor) -> Tensor:
        """Return the logits."""
        logits: Tensor = self.head(self.backbone.cls_feature(images))
        return logits


def build_head(options: HeadOptions, width: int, num_classes: int, seed: int) -> nn.Module:
    """Return a new head, its weights a function of the seed."""
    # The fork leaves the generator of the caller as it was.
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        first: list[nn.Module] = []
        if options.kind == "mlp":
            first = [nn.Linear(width, options.hidden).apply(init_weights), nn.GELU()]
            width = options.hidden
        last = nn.Linear(width, num_classes).apply(init_weights)
    # ImageNet fine-tuning scales by 0.001, as released: the first logits are then almost equal for
    # all classes.
    with torch.no_grad():
        last.weight.mul_(options.scale)
    return nn.Sequential(*first, last) if first else last


def load_first_layer(head: nn.Module, state: Mapping[str, Tensor]) -> None:
    """Load weight and bias of a linear layer into the first layer of a two-layer head.

    iBOT's protocol starts from the pretrained projection; the release meant to, but its checkpoint
    names do not match and the loader ignores them (E8).

    Raises:
        ValueError: The shapes differ.
    """
    first = next(head.children())
    assert isinstance(first, nn.Linear)
    wanted = tuple(first.weight.shape)
    found = tuple(state["weight"].shape)
    if wanted != found:
        raise ValueError(
            f"head.init pretrained: the projection is {found}, head.hidden asks for {wanted}"
        )
    first.load_state_dict(state)


def build_parameter_groups(
    model: ImageClassifier, layer_decay: float, *, decay_tokens: bool = False
) -> list[dict[str, Any]]:
    """Return one group per layer and decay.

    Biases and other tensors of one dimension have no weight decay; class token and position table
    only with `decay_tokens` (E23).
    """
    tokens = (model.backbone.cls_token, model.backbone.pos_embed)
    spared = () if decay_tokens else tokens
    return build_layer_decay_groups(model, model.backbone, layer_decay, no_weight_decay=spared)
