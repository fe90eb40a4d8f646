"""ViT and head: the two networks that are trained, their loss and their random draws.

Shapes: N images, K classes, H x W pixels.
"""

import copy
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from mugs.data.dense.label_maps import VOID
from mugs.models.stochastic_depth import draw_depth_uniforms
from mugs.models.vit import ViT
from mugs.random_streams import StepStream, step_seed
from mugs.transfer.pyramid import Pyramid, TappedViT
from mugs.transfer.segmentation.config import SegmenterConfig
from mugs.transfer.segmentation.heads import (
    ChannelDropout,
    FCNHead,
    LinearHead,
    UPerHead,
    resize_bilinear,
)


class Segmenter(nn.Module):
    """What both variants share: logits of whole images and the draws of a training step."""

    backbone: TappedViT
    weights: tuple[float, ...]

    def forward(self, images: Tensor) -> list[Tensor]:
        """(N, 3, H, W) -> logits (N, K, h, w) of every head, the one that counts first."""
        raise NotImplementedError

    def logits(self, images: Tensor) -> Tensor:
        """(N, 3, H, W) of any size -> (N, K, H, W); images are padded at the right and below with zeros."""
        height, width = images.shape[2:]
        cell = 2 * self.backbone.vit.config.patch_size
        padded = F.pad(images, (0, -width % cell, 0, -height % cell))
        return resize_bilinear(self.forward(padded)[0].float(), padded.shape[2:])[
            ..., :height, :width
        ]

    def loss(self, outputs: Sequence[Tensor], labels: Tensor) -> dict[str, Tensor]:
        """Loss of each head on labels (N, H, W), weighted: `decode`, and `auxiliary` where there is one."""
        names = ("decode", "auxiliary")[: len(outputs)]
        return {
            name: weight * pixel_loss(logits, labels)
            for name, weight, logits in zip(names, self.weights, outputs, strict=True)
        }

    def set_draws(
        self, seed: int, step: int, batch_size: int, mine: slice, device: torch.device
    ) -> None:
        """Stochastic depth and dropout of the coming pass: this rank's part of those of the global batch."""
        depth = draw_depth_uniforms(
            seed, step, branches=2 * len(self.backbone.vit.blocks), crops=1, batch_size=batch_size
        )
        self.backbone.vit.set_depth_uniforms(depth[:, 0, mine].to(device))
        generator = torch.Generator().manual_seed(step_seed(seed, step, StepStream.DROPOUT))
        for dropout in self._dropouts():
            dropout.uniform = torch.rand(batch_size, dropout.channels, generator=generator)[
                mine
            ].to(device)

    def clear_draws(self) -> None:
        """Drop nothing from now on."""
        self.backbone.vit.set_depth_uniforms(None)
        for dropout in self._dropouts():
            dropout.uniform = None

    def _dropouts(self) -> list[ChannelDropout]:
        return [m for m in self.modules() if isinstance(m, ChannelDropout)]


class UPerNet(Segmenter):
    """The whole network is trained; an FCN head on the stride-16 map helps."""

    backbone: Pyramid

    def __init__(self, vit: ViT, config: SegmenterConfig) -> None:
        super().__init__()
        self.backbone = Pyramid(vit, normed=True)
        width, classes, dropout = self.backbone.width, config.num_classes, config.dropout
        self.head = UPerHead(width, config.channels or width, classes, dropout)
        self.auxiliary = FCNHead(width, config.auxiliary_channels, classes, dropout)
        self.weights = (1.0, config.auxiliary_weight)

    def forward(self, images: Tensor) -> list[Tensor]:
        """Logits of the head at stride 4 and, in training, of the auxiliary head at stride 16."""
        maps = self.backbone(images)
        return [self.head(maps), self.auxiliary(maps[2])] if self.training else [self.head(maps)]


class LinearSegmenter(Segmenter):
    """Only the head is trained (iBOT's linear variant)."""

    def __init__(self, vit: ViT, config: SegmenterConfig) -> None:
        super().__init__()
        self.backbone = TappedViT(vit, normed=True).requires_grad_(False)
        self.head = LinearHead(self.backbone.width, config.num_classes, config.dropout)
        self.weights = (1.0,)

    def forward(self, images: Tensor) -> list[Tensor]:
        """Logits at stride 16."""
        with torch.no_grad():
            maps = self.backbone.tapped(images)
        return [self.head(torch.cat(maps, dim=1))]

    def set_draws(
        self, seed: int, step: int, batch_size: int, mine: slice, device: torch.device
    ) -> None:
        """Dropout only: a frozen ViT keeps every branch."""
        super().set_draws(seed, step, batch_size, mine, device)
        self.backbone.vit.set_depth_uniforms(None)


def build_segmenter(vit: ViT, config: SegmenterConfig, *, seed: int) -> Segmenter:
    """The variant by name; new weights are drawn from the seed."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return UPerNet(vit, config) if config.variant == "upernet" else LinearSegmenter(vit, config)


def count_segmenter_flops(model: Segmenter, crop: int) -> float:
    """Floating-point operations of one image's part of a training step; backward counts twice forward.

    Counted on a copy without memory. Of the linear variant only forward counts: its backward pass is next to nothing.
    """
    twin = copy.deepcopy(model).to("meta").eval()
    twin.training = True  # all heads, but batch norms that ask no other rank
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        twin(torch.empty(1, 3, crop, crop, device="meta"))
    passes = 3 if isinstance(model, UPerNet) else 1
    return passes * float(counter.get_total_flops())


def pixel_loss(logits: Tensor, labels: Tensor) -> Tensor:
    """Cross-entropy of logits (N, K, h, w), resized to labels (N, H, W).

    Void pixels add nothing, but the sum is divided by *all* pixels (mmsegmentation), so a void crop costs zero.
    """
    full = resize_bilinear(logits.float(), labels.shape[1:])
    return F.cross_entropy(full, labels, ignore_index=VOID, reduction="sum") / labels.numel()
