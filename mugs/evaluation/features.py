"""Frozen features of a data set, over any number of ranks.

N images, D width.
"""

from collections.abc import Callable, Iterable
from typing import Literal

import torch
from torch import Tensor

from mugs import distributed
from mugs.models.vit import ViT

Feature = Literal["cls", "patch_mean", "last4_cls", "cls_patchmean"]


def build_feature_function(vit: ViT, feature: Feature) -> Callable[[Tensor], Tensor]:
    """Images -> features (N, D'), all after the final LayerNorm.

    cls: last class token. patch_mean: mean of the last patch tokens. last4_cls: class tokens of the last four blocks,
    concatenated. cls_patchmean: class token and patch mean, entries alternating as released.
    """

    def cls(images: Tensor) -> Tensor:
        return vit.cls_feature(images)

    def patch_mean(images: Tensor) -> Tensor:
        mean: Tensor = vit.norm(vit.tokens(images))[:, 1:].mean(dim=1)
        return mean

    def last4_cls(images: Tensor) -> Tensor:
        return torch.cat([tokens[:, 0] for tokens in vit.last_blocks(images, 4)], dim=-1)

    def cls_patchmean(images: Tensor) -> Tensor:
        tokens = vit.norm(vit.tokens(images))
        return torch.stack([tokens[:, 0], tokens[:, 1:].mean(dim=1)], dim=-1).flatten(1)

    functions = {
        "cls": cls,
        "patch_mean": patch_mean,
        "last4_cls": last4_cls,
        "cls_patchmean": cls_patchmean,
    }
    return functions[feature]


@torch.no_grad()
def extract_features(
    model: Callable[[Tensor], Tensor],
    batches: Iterable[tuple[Tensor, Tensor, Tensor]],
    *,
    device: torch.device,
) -> tuple[Tensor, Tensor, Tensor]:
    """Features (n, D) fp32, labels and ids of all ranks' batches, sorted by id, on the device of this rank."""
    features, labels, ids = [], [], []
    for images, label, index in batches:
        features.append(model(images.to(device)).float())
        labels.append(label)
        ids.append(index)
    mine = (torch.cat(features), torch.cat(labels).to(device), torch.cat(ids).to(device))
    features_of_all, labels_of_all, ids_of_all = (
        distributed.all_gather_uneven_rows(part) for part in mine
    )
    order = ids_of_all.argsort()
    return features_of_all[order], labels_of_all[order], ids_of_all[order]
