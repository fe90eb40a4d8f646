"""UPerNet's decode head, the auxiliary FCN head, and the head of Semantic FPN.

As in mmsegmentation, convolutions in front of a batch norm have no bias, and all resizing is
bilinear with align_corners off.

Shapes: N images, D width of the ViT, C channels of the head, K classes.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mugs.models.batch_norm import AllRanksBatchNorm2d

POOL_SCALES = (1, 2, 3, 6)  # cells per side of the pooled maps (PSPNet, and UPerNet after it)


class ChannelDropout(nn.Module):
    """Dropout of whole channels by draws that are set from outside.

    So the draws can be a function of the sample and not of the rank. `uniform` (N, C) holds draws
    from U(0, 1) for the next pass; without them nothing is dropped.
    """

    uniform: Tensor | None

    def __init__(self, channels: int, rate: float) -> None:
        super().__init__()
        self.channels = channels
        self.rate = rate
        self.uniform = None

    def forward(self, x: Tensor) -> Tensor:
        """Drop channels of (N, C, H, W); kept ones are divided by the keep probability."""
        if self.rate == 0.0 or self.uniform is None:
            return x
        keep = 1.0 - self.rate
        return x * ((self.uniform < keep).to(x.dtype) / keep)[:, :, None, None]


def build_pixel_classifier(channels: int, num_classes: int, dropout: float) -> nn.Sequential:
    """Return dropout and a 1x1 convolution with weights N(0, 0.01) and bias 0."""
    layer = nn.Conv2d(channels, num_classes, 1)
    nn.init.normal_(layer.weight, std=0.01)
    nn.init.zeros_(nn.Module.get_parameter(layer, "bias"))
    return nn.Sequential(ChannelDropout(channels, dropout), layer)


def conv_norm(inputs: int, outputs: int, size: int) -> nn.Sequential:
    """Return a convolution that keeps the size (Kaiming normal, fan out), batch norm, ReLU."""
    conv = nn.Conv2d(inputs, outputs, size, padding=size // 2, bias=False)
    nn.init.kaiming_normal_(conv.weight, mode="fan_out", nonlinearity="relu")
    return nn.Sequential(conv, AllRanksBatchNorm2d(outputs), nn.ReLU())


def resize_bilinear(x: Tensor, size: torch.Size | tuple[int, int]) -> Tensor:
    """Resize (N, C, h, w) to (N, C, *size), bilinear."""
    return (
        x
        if x.shape[2:] == size
        else F.interpolate(x, size=tuple(size), mode="bilinear", align_corners=False)
    )


class UPerHead(nn.Module):
    """UPerNet's head (Xiao et al., arXiv 1807.10221).

    Pyramid pooling on the coarsest map, a top-down sum over the others, all fused at the finest.
    """

    def __init__(self, width: int, channels: int, num_classes: int, dropout: float) -> None:
        super().__init__()
        self.pools = nn.ModuleList(
            nn.Sequential(nn.AdaptiveAvgPool2d(scale), *conv_norm(width, channels, 1))
            for scale in POOL_SCALES
        )
        self.bottleneck = conv_norm(width + len(POOL_SCALES) * channels, channels, 3)
        self.laterals = nn.ModuleList(conv_norm(width, channels, 1) for _ in range(3))
        self.outputs = nn.ModuleList(conv_norm(channels, channels, 3) for _ in range(3))
        self.fuse = conv_norm(4 * channels, channels, 3)
        self.classifier = build_pixel_classifier(channels, num_classes, dropout)

    def forward(self, maps: list[Tensor]) -> Tensor:
        """Map four maps (N, D, h, w), finest first, to logits (N, K, h, w) of the finest size."""
        top = maps[-1]
        pooled = [resize_bilinear(pool(top), top.shape[2:]) for pool in self.pools]
        levels = [lateral(x) for lateral, x in zip(self.laterals, maps[:3], strict=True)]
        levels.append(self.bottleneck(torch.cat([top, *pooled], dim=1)))
        # Top-down: each level adds the one above it, which has its sum already.
        for index in (2, 1, 0):
            levels[index] = levels[index] + resize_bilinear(
                levels[index + 1], levels[index].shape[2:]
            )
        # The pooled top level has had a 3x3 convolution already, the bottleneck.
        smoothed = [output(x) for output, x in zip(self.outputs, levels[:3], strict=True)]
        aligned = [resize_bilinear(x, smoothed[0].shape[2:]) for x in (*smoothed, levels[3])]
        logits: Tensor = self.classifier(self.fuse(torch.cat(aligned, dim=1)))
        return logits


class SemanticFPNHead(nn.Module):
    """Semantic FPN's head (Kirillov et al., arXiv 1901.02446).

    Each map is brought to the finest size by 3x3 convolutions that alternate with doubling, and all
    are summed. The finest map has one convolution, too.
    """

    def __init__(self, width: int, channels: int, num_classes: int, dropout: float) -> None:
        super().__init__()
        self.scales = nn.ModuleList()
        for doublings in range(4):
            layers: list[nn.Module] = []
            for number in range(max(doublings, 1)):
                layers.append(conv_norm(width if number == 0 else channels, channels, 3))
                if doublings > 0:
                    layers.append(nn.Upsample(scale_factor=2, mode="bilinear"))
            self.scales.append(nn.Sequential(*layers))
        self.classifier = build_pixel_classifier(channels, num_classes, dropout)

    def forward(self, maps: list[Tensor]) -> Tensor:
        """Map four maps (N, C, h, w), finest first, to logits (N, K, h, w) of the finest size."""
        finest = self.scales[0](maps[0])
        total = finest
        for scale, x in zip(list(self.scales)[1:], maps[1:], strict=True):
            # A map of an odd side was rounded down, so doubling does not give the finest size.
            total = total + resize_bilinear(scale(x), finest.shape[2:])
        logits: Tensor = self.classifier(total)
        return logits


def build_fcn_head(width: int, channels: int, num_classes: int, dropout: float) -> nn.Sequential:
    """Return a head from (N, D, h, w) to (N, K, h, w): one 3x3 convolution and a classifier."""
    return nn.Sequential(
        *conv_norm(width, channels, 3), build_pixel_classifier(channels, num_classes, dropout)
    )
