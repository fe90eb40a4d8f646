"""Four feature maps from a plain ViT, as the dense tasks of iBOT and Mugs make them.

Strides with patch 16: 4 (two transposed convolutions), 8 (one), 16 (as it is), 32 (max-pool). All
maps have the width D of the ViT.
"""

import math

from torch import Tensor, nn

from mugs.models.batch_norm import AllRanksBatchNorm2d
from mugs.models.vit import ViT


def tapped_blocks(depth: int) -> tuple[int, int, int, int]:
    """Return the zero-based blocks whose outputs are used: 3, 5, 7, 11 of twelve.

    Other depths use blocks in proportion.
    """
    first, second, third = (math.ceil(depth * share / 6) - 1 for share in (2, 3, 4))
    return first, second, third, depth - 1


class TappedViT(nn.Module):
    """A ViT that returns the patch tokens of four blocks.

    Sides of images have to be multiples of the patch size. normed: apply the final LayerNorm to
    each of the four outputs (segmentation) or to none (detection).
    """

    def __init__(self, vit: ViT, *, normed: bool) -> None:
        super().__init__()
        self.vit = vit
        self.normed = normed
        self.blocks = tapped_blocks(len(vit.blocks))
        self.width = vit.config.embed_dim
        # Frozen if unused: data-parallel training waits for a gradient of every trained parameter.
        vit.norm.requires_grad_(normed)

    def tapped_maps(self, images: Tensor) -> list[Tensor]:
        """Map images (N, 3, H, W) to four maps (N, D, H / patch, W / patch)."""
        patch = self.vit.config.patch_size
        maps = {}
        for index, tokens in enumerate(self.vit.block_outputs(images)):
            if index in self.blocks:
                kept = self.vit.norm(tokens) if self.normed else tokens
                # Without the class token, (N, h * w, D) becomes (N, D, h, w).
                maps[index] = (
                    kept[:, 1:]
                    .transpose(1, 2)
                    .reshape(len(images), self.width, images.shape[2] // patch, -1)
                )
        # By index, because a shallow ViT uses a block twice.
        return [maps[index] for index in self.blocks]


class Pyramid(TappedViT):
    """A ViT and one operation behind each of its four outputs."""

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
        """Return the pixels per cell of each map."""
        patch = self.vit.config.patch_size
        return patch // 4, patch // 2, patch, 2 * patch

    def forward(self, images: Tensor) -> list[Tensor]:
        """Map images (N, 3, H, W) to (N, D, H / stride, W / stride) for each stride."""
        return [scale(x) for scale, x in zip(self.scales, self.tapped_maps(images), strict=True)]


def _doubled(width: int) -> nn.ConvTranspose2d:
    """Return a transposed convolution that doubles the sides of a map."""
    return nn.ConvTranspose2d(width, width, kernel_size=2, stride=2)
