"""Frozen features of a data set, over any number of ranks.

Shapes: N images, D width of the backbone, D' width of a feature.
"""

from collections.abc import Callable, Iterable

import torch
from torch import Tensor

from mugs import distributed
from mugs.evaluation.config import Feature
from mugs.models.vit import ViT


def build_feature_function(vit: ViT, feature: Feature) -> Callable[[Tensor], Tensor]:
    """Return a function from images (N, 3, H, W) to features (N, D'), after the final LayerNorm.

    - `cls`: the class token of the last block.
    - `patch_mean`: the mean of the patch tokens of the last block.
    - `last4_cls`: the class tokens of the last four blocks, concatenated.
    - `cls_patchmean`: class token and patch mean.
    """

    def compute(images: Tensor) -> Tensor:
        if feature == "cls":
            return vit.cls_feature(images)
        if feature == "last4_cls":
            return torch.cat([tokens[:, 0] for tokens in vit.last_blocks(images, 4)], dim=-1)

        tokens = vit.norm(vit.tokens(images))
        patch_mean: Tensor = tokens[:, 1:].mean(dim=1)
        if feature == "patch_mean":
            return patch_mean
        # Stacked and flattened, so the entries alternate: class, patch, class, patch ... The
        # released classifiers expect this order.
        return torch.stack([tokens[:, 0], patch_mean], dim=-1).flatten(1)

    return compute


@torch.no_grad()
def extract_features(
    model: Callable[[Tensor], Tensor],
    batches: Iterable[tuple[Tensor, Tensor, Tensor]],
    *,
    device: torch.device,
) -> tuple[Tensor, Tensor, Tensor]:
    """Compute the features of all ranks' batches of (images on the device, labels, ids).

    Returns features (N, D') in fp32, labels and ids, all sorted by id, on the device of this rank.
    """
    features, labels, ids = [], [], []
    for images, label, index in batches:
        features.append(model(images).float())
        labels.append(label)
        ids.append(index)
    own_parts = (torch.cat(features), torch.cat(labels).to(device), torch.cat(ids).to(device))

    # Ranks hold unequal, interleaved parts. Sorting by id makes the result independent of the
    # number of ranks.
    all_features, all_labels, all_ids = (
        distributed.all_gather_uneven_rows(part) for part in own_parts
    )
    order = all_ids.argsort()
    return all_features[order], all_labels[order], all_ids[order]
