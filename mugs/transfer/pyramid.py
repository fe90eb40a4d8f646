"""Four feature maps from a plain ViT, as the dense tasks of iBOT and Mugs make them.

Strides with patch 16: 4 (two transposed convolutions), 8 (one), 16 (as it is), 32 (max-pool). All as wide as the ViT.
"""

import math

from torch import Tensor, nn

from mugs.models.batch_norm import AllRanksBatchNorm2d
from mugs.models.vit import ViT


def tapped_blocks(depth: int) -> tuple[int, int, int, int]:
    """Zero-based blocks whose outputs are used: 3, 5, 7, 11 of twelve, in proportion for other depths."""
    first, second, third = (math.ceil(depth * share / 6) - 1 for share in (2, 3, 4))
    return first, second, third, depth - 1


class TappedViT(nn.Module):
    """A ViT that hands out the patch tokens of four blocks; images need sides that are multiples of the patch size.

    normed: the ViT's final LayerNorm on each of the four outputs (segmentation) or on none (detection). Where it is not
    used it is frozen, so that every trained parameter receives a gradient.
    """

    def __init__(self, vit: ViT, *, normed: bool) -> None:
        super().__init__()
        self.vit, self.normed = vit, normed
        self.blocks = tapped_blocks(len(vit.blocks))
        self.width = vit.config.embed_dim
        vit.norm.requires_grad_(normed)

    def tapped(self, images: Tensor) -> list[Tensor]:
        """(N, 3, H, W) -> four maps (N, D, H / patch, W / patch), class token dropped."""
        patch = self.vit.config.patch_size
        height, width = images.shape[2] // patch, images.shape[3] // patch
        wanted = set(self.blocks)
        found = {}
        for index, tokens in enumerate(self.vit.block_outputs(images)):
            if index in wanted:
                kept = self.vit.norm(tokens) if self.normed else tokens
                found[index] = (
                    kept[:, 1:].transpose(1, 2).reshape(len(images), self.width, height, width)
                )
        return [found[index] for index in self.blocks]


class Pyramid(TappedViT):
    """A ViT and the four operations behind it."""

    def __init__(self, vit: ViT, *, normed: bool) -> None:
        super().__init__(vit, normed=normed)
        width = self.width
        self.scales = nn.ModuleList(
            [
                nn.Sequential(
                    _doubled(width), AllRanksBatchNorm2d(width), nn.GELU(), _doubled(width)
                ),
                _doubled(width),
                nn.Identity(),
                nn.MaxPool2d(2),
            ]
        )

    @property
    def strides(self) -> tuple[int, int, int, int]:
        """Pixels per cell of each map."""
        patch = self.vit.config.patch_size
        return patch // 4, patch // 2, patch, 2 * patch

    def forward(self, images: Tensor) -> list[Tensor]:
        """(N, 3, H, W) -> (N, D, H / stride, W / stride) for each stride."""
        return [scale(x) for scale, x in zip(self.scales, self.tapped(images), strict=True)]


def _doubled(width: int) -> nn.ConvTranspose2d:
    return nn.ConvTranspose2d(width, width, kernel_size=2, stride=2)
