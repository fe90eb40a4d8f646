"""Four feature maps from a plain ViT, as the dense tasks of iBOT, Mugs and MGC make them.

Strides with patch 16: 4 (two transposed convolutions), 8 (one), 16 (as it is), 32 (max-pool). All
maps have the width D of the ViT.
"""

import math
from typing import Literal

from torch import Tensor, nn
from torchvision.ops import FeaturePyramidNetwork
from torchvision.ops.feature_pyramid_network import ExtraFPNBlock

from mugs.models.batch_norm import AllRanksBatchNorm2d
from mugs.models.vit import ViT

# Zero-based blocks of twelve whose outputs are used.
Taps = Literal["3-5-7-11", "2-5-8-11"]


def tapped_blocks(depth: int, taps: Taps = "3-5-7-11") -> tuple[int, int, int, int]:
    """Return the zero-based blocks whose outputs are used; other depths than 12 in proportion."""
    first, second, third, last = (
        math.ceil(depth * (int(block) + 1) / 12) - 1 for block in taps.split("-")
    )
    return first, second, third, last


class TappedViT(nn.Module):
    """A ViT that returns the patch tokens of four blocks.

    Sides of images have to be multiples of the patch size. normed: apply the final LayerNorm to
    each of the four outputs (segmentation, and MGC's detection) or to none (detection).
    """

    def __init__(self, vit: ViT, *, normed: bool, taps: Taps = "3-5-7-11") -> None:
        super().__init__()
        self.vit = vit
        self.normed = normed
        self.blocks = tapped_blocks(len(vit.blocks), taps)
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

    def __init__(self, vit: ViT, *, normed: bool, taps: Taps = "3-5-7-11") -> None:
        super().__init__(vit, normed=normed, taps=taps)
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


def build_fpn(
    width: int, channels: int, extra: ExtraFPNBlock | None = None
) -> FeaturePyramidNetwork:
    """Return an FPN on the four maps; `extra` makes further maps from the coarsest one."""
    fpn = FeaturePyramidNetwork([width] * 4, channels, extra)
    # The initial weights of OpenMMLab; torchvision's are Kaiming uniform.
    for module in fpn.modules():
        if isinstance(module, nn.Conv2d):
            nn.init.xavier_uniform_(module.weight)
    return fpn


def run_fpn(fpn: FeaturePyramidNetwork, maps: list[Tensor]) -> list[Tensor]:
    """Return the maps of an FPN, finest first."""
    return list(fpn({str(i): x for i, x in enumerate(maps)}).values())


def _doubled(width: int) -> nn.ConvTranspose2d:
    """Return a transposed convolution that doubles the sides of a map."""
    return nn.ConvTranspose2d(width, width, kernel_size=2, stride=2)
