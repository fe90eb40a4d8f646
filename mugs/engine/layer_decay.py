"""AdamW whose learning rate shrinks from the head down to the patch embedding."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from mugs.models.vit import ViT


def build_layer_decay_groups(
    model: nn.Module, vit: ViT, decay: float, *, no_weight_decay: Sequence[nn.Parameter] = ()
) -> list[dict[str, Any]]:
    """Groups of the trained parameters of `model`, which contains `vit`, as `mugs.engine.optim.apply_rate_schedule` wants them.

    Scale decay ** (L + 1 - id) for L blocks: id 0 is patch embedding, class token and positions, id i + 1 block i, and
    L + 1 all the rest, the final LayerNorm included (timm's `param_groups_layer_decay` counts that to the last block).
    Tensors of one dimension have no weight decay, nor have those in `no_weight_decay`: in fine-tuning class token and
    positions, in the dense tasks none (released: there the exemption misses their prefixed names).
    """
    depth = len(vit.blocks)
    layers = {id(p): depth + 1 for p in model.parameters()}
    layers |= {id(p): 0 for p in (vit.cls_token, vit.pos_embed, *vit.patch_embed.parameters())}
    layers |= {
        id(p): index + 1 for index, block in enumerate(vit.blocks) for p in block.parameters()
    }
    spared = {id(p) for p in no_weight_decay}
    groups: dict[tuple[int, bool], list[nn.Parameter]] = {}
    for parameter in model.parameters():
        if parameter.requires_grad:
            decays = parameter.ndim > 1 and id(parameter) not in spared
            groups.setdefault((layers[id(parameter)], decays), []).append(parameter)
    return [
        {
            "params": members,
            "lr_scale": decay ** (depth + 1 - layer),
            "decay": decays,
            "weight_decay": 0.0,
        }
        for (layer, decays), members in groups.items()
    ]


def build_adamw(groups: list[dict[str, Any]]) -> torch.optim.AdamW:
    """Fused AdamW, betas 0.9 / 0.999, eps 1e-8; rates are set at every step."""
    return torch.optim.AdamW(groups, lr=0.0, fused=True)
