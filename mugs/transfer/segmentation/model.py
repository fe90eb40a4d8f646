"""The three segmentation networks, their loss and their random draws.

Shapes: N images, K classes, H x W pixels.
"""

from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mugs.data.dense.label_maps import VOID
from mugs.devices import copy_to_device
from mugs.models.flops import copy_to_meta, count_flops
from mugs.models.stochastic_depth import draw_depth_uniforms
from mugs.models.vit import ViT
from mugs.random_streams import StepStream, step_seed
from mugs.transfer.pyramid import Pyramid, TappedViT, build_fpn, run_fpn
from mugs.transfer.segmentation.config import SegmenterConfig, Variant
from mugs.transfer.segmentation.heads import (
    ChannelDropout,
    SemanticFPNHead,
    UPerHead,
    build_fcn_head,
    build_pixel_classifier,
    resize_bilinear,
)

FPN_HEAD_CHANNELS = 128  # mmsegmentation's; its FPN has 256


class Segmenter(nn.Module):
    """Base of all variants: logits of whole images, and the draws of a training step."""

    backbone: TappedViT
    weights: tuple[float, ...]

    def forward(self, images: Tensor) -> list[Tensor]:
        """Map images (N, 3, H, W) to logits (N, K, h, w) of each head, the main one first."""
        raise NotImplementedError

    def logits(self, images: Tensor) -> Tensor:
        """Map images (N, 3, H, W) of any size to logits (N, K, H, W)."""
        height, width = images.shape[2:]
        # As in the release: the ViT does not see the pixels beyond its last whole patch, and the
        # logits are stretched over all. Test images have such sides where their short side is below
        # the window.
        patch = self.backbone.vit.config.patch_size
        seen = images[..., : height - height % patch, : width - width % patch]
        return resize_bilinear(self.forward(seen)[0].float(), images.shape[2:])

    def loss(self, outputs: Sequence[Tensor], labels: Tensor) -> dict[str, Tensor]:
        """Return the weighted loss of each head on labels (N, H, W), by name."""
        names = ("decode", "auxiliary")[: len(outputs)]
        return {
            name: weight * pixel_loss(logits, labels)
            for name, weight, logits in zip(names, self.weights, outputs, strict=True)
        }

    def set_draws(
        self, seed: int, step: int, batch_size: int, mine: slice, device: torch.device
    ) -> None:
        """Set stochastic depth and dropout of the next pass.

        Draws are made for the global batch, and this rank takes the columns `mine`.
        """
        depth = draw_depth_uniforms(
            seed, step, branches=2 * len(self.backbone.vit.blocks), crops=1, batch_size=batch_size
        )
        self.backbone.vit.set_depth_uniforms(depth[:, 0, mine])
        generator = torch.Generator().manual_seed(step_seed(seed, step, StepStream.DROPOUT))
        for dropout in self._dropouts():
            draws = torch.rand(batch_size, dropout.channels, generator=generator)
            dropout.uniform = copy_to_device(draws[mine], device)

    def clear_draws(self) -> None:
        """Drop nothing from now on."""
        self.backbone.vit.set_depth_uniforms(None)
        for dropout in self._dropouts():
            dropout.uniform = None

    def _dropouts(self) -> list[ChannelDropout]:
        return [m for m in self.modules() if isinstance(m, ChannelDropout)]


class UPerNet(Segmenter):
    """Trains everything; an auxiliary FCN head on the stride-16 map adds a loss."""

    backbone: Pyramid

    def __init__(self, vit: ViT, config: SegmenterConfig) -> None:
        super().__init__()
        self.backbone = Pyramid(vit, normed=True, taps=config.taps)
        width = self.backbone.width
        classes = config.num_classes
        dropout = config.dropout
        self.head = UPerHead(width, config.channels or width, classes, dropout)
        self.auxiliary = build_fcn_head(width, config.auxiliary_channels, classes, dropout)
        self.weights = (1.0, config.auxiliary_weight)

    def forward(self, images: Tensor) -> list[Tensor]:
        """Return logits at stride 4 and, in training, those of the auxiliary head at stride 16."""
        maps = self.backbone(images)
        return [self.head(maps), self.auxiliary(maps[2])] if self.training else [self.head(maps)]


class SemanticFPN(Segmenter):
    """Trains everything (MGC's evaluation)."""

    backbone: Pyramid

    def __init__(self, vit: ViT, config: SegmenterConfig) -> None:
        super().__init__()
        self.backbone = Pyramid(vit, normed=True, taps=config.taps)
        channels = config.channels or FPN_HEAD_CHANNELS
        self.fpn = build_fpn(self.backbone.width, 2 * channels)
        self.head = SemanticFPNHead(2 * channels, channels, config.num_classes, config.dropout)
        self.weights = (1.0,)

    def forward(self, images: Tensor) -> list[Tensor]:
        """Return logits at stride 4."""
        return [self.head(run_fpn(self.fpn, self.backbone(images)))]


class LinearSegmenter(Segmenter):
    """Trains only one classifier on the four maps side by side (iBOT's linear variant)."""

    def __init__(self, vit: ViT, config: SegmenterConfig) -> None:
        super().__init__()
        self.backbone = TappedViT(vit, normed=True, taps=config.taps).requires_grad_(False)
        # No norm and no dropout: the config of iBOT names a norm, but none is built.
        self.head = build_pixel_classifier(4 * self.backbone.width, config.num_classes, 0.0)
        self.weights = (1.0,)

    def forward(self, images: Tensor) -> list[Tensor]:
        """Return logits at stride 16."""
        with torch.no_grad():
            maps = self.backbone.tapped_maps(images)
        return [self.head(torch.cat(maps, dim=1))]

    def set_draws(
        self, seed: int, step: int, batch_size: int, mine: slice, device: torch.device
    ) -> None:
        """Drop nothing: a frozen ViT keeps every branch, and the head has no dropout."""
        self.clear_draws()


VARIANTS: dict[Variant, Callable[[ViT, SegmenterConfig], Segmenter]] = {
    "upernet": UPerNet,
    "linear": LinearSegmenter,
    "semantic_fpn": SemanticFPN,
}


def build_segmenter(vit: ViT, config: SegmenterConfig, *, seed: int) -> Segmenter:
    """Return the variant that `config` names; new weights are drawn from the seed."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return VARIANTS[config.variant](vit, config)


def count_segmenter_flops(model: Segmenter, crop: int) -> float:
    """Count the floating-point operations of a training step on one image.

    Backward counts twice forward. In the linear variant it is negligible and not counted.
    """
    twin = copy_to_meta(model, model).eval()
    # The network as a whole trains, so all heads run. Its batch norms do not: they would wait for
    # the other ranks.
    twin.training = True
    with torch.no_grad():
        flops = count_flops(lambda: twin(torch.empty(1, 3, crop, crop, device="meta"))[0])
    return float(flops * (1 if isinstance(model, LinearSegmenter) else 3))


def pixel_loss(logits: Tensor, labels: Tensor) -> Tensor:
    """Return the cross-entropy of logits (N, K, h, w), resized to labels (N, H, W).

    Void pixels add nothing, but the sum is divided by the number of all pixels, as in
    mmsegmentation.
    """
    # So a crop that is all void costs 0; torch's mean over valid pixels would be NaN.
    full = resize_bilinear(logits.float(), labels.shape[1:])
    return F.cross_entropy(full, labels, ignore_index=VOID, reduction="sum") / labels.numel()
