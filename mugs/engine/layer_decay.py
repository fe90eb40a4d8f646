"""AdamW with layer-wise learning-rate decay, from the head down to the patch embedding."""

from collections.abc import Sequence
from typing import Any, Literal

import torch
from torch import nn

from mugs.models.vit import ViT

DenseDecay = Literal["matrices", "all", "all_but_norms"]
"""Which parameters of a dense task have weight decay.

"matrices": those with more than one dimension, class token and positions among them (iBOT and Mugs,
whose exemption of the two misses their prefixed names). "all": iBOT's linear segmentation.
"all_but_norms": all but norms, class token and positions (MGC).
"""


def build_layer_decay_groups(
    model: nn.Module,
    vit: ViT,
    decay: float,
    *,
    no_weight_decay: Sequence[nn.Parameter] = (),
    decay_vectors: bool = False,
) -> list[dict[str, Any]]:
    """Build groups of the trained parameters of `model`, which contains `vit`.

    The learning rate of a layer is scaled by decay ** (L + 1 - id) for L blocks. The id of the
    patch embedding, class token and positions is 0, that of block i is i + 1, and that of the rest
    L + 1. The rest includes the final LayerNorm, which timm's `param_groups_layer_decay` counts to
    the last block.

    Tensors of one dimension have no weight decay unless `decay_vectors`. Nor have those in
    `no_weight_decay`: class token and positions in fine-tuning.
    """
    depth = len(vit.blocks)
    # By identity, not by name: `vit` may sit anywhere in `model`.
    layers = {id(p): depth + 1 for p in model.parameters()}
    layers |= {id(p): 0 for p in (vit.cls_token, vit.pos_embed, *vit.patch_embed.parameters())}
    layers |= {
        id(p): index + 1 for index, block in enumerate(vit.blocks) for p in block.parameters()
    }
    spared = {id(p) for p in no_weight_decay}
    groups: dict[tuple[int, bool], list[nn.Parameter]] = {}
    for parameter in model.parameters():
        if parameter.requires_grad:
            decays = (parameter.ndim > 1 or decay_vectors) and id(parameter) not in spared
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


def build_dense_groups(
    model: nn.Module, vit: ViT, layer_decay: float, decay: DenseDecay
) -> list[dict[str, Any]]:
    """Build the groups of a dense task, as `build_layer_decay_groups` does."""
    if decay != "all_but_norms":
        return build_layer_decay_groups(model, vit, layer_decay, decay_vectors=decay == "all")
    norms = (m for m in model.modules() if isinstance(m, nn.LayerNorm | nn.BatchNorm2d))
    spared = [vit.cls_token, vit.pos_embed, *(p for norm in norms for p in norm.parameters())]
    return build_layer_decay_groups(
        model, vit, layer_decay, no_weight_decay=spared, decay_vectors=True
    )


def build_adamw(groups: list[dict[str, Any]]) -> torch.optim.AdamW:
    """Build a fused AdamW, betas 0.9 / 0.999, eps 1e-8; rates are set at every step."""
    # Fused, because only that kernel can skip a step on the device (`update_if_finite`).
    return torch.optim.AdamW(groups, lr=0.0, fused=True)
