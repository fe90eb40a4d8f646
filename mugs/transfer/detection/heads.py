"""The networks behind pooled regions: one for class and box, one for the mask.

Shapes: R regions, C channels.
"""

import torch
from torch import Tensor, nn
from torchvision.models.detection.faster_rcnn import FastRCNNConvFCHead
from torchvision.models.detection.mask_rcnn import MaskRCNNHeads, MaskRCNNPredictor

from mugs.models.batch_norm import AllRanksBatchNorm2d
from mugs.transfer.detection.config import DetectorConfig

# Cells per side of the regions that the two heads read (mmdet's config).
BOX_SIZE = 7
MASK_INPUT = 14


class BoxHead(nn.Module):
    """Convolutions with batch norm, one layer of `fc_width`, then classes and deltas.

    The background is the last class. Every class but the background has its own deltas.
    """

    def __init__(self, config: DetectorConfig) -> None:
        super().__init__()
        self.num_classes = config.num_classes
        self.trunk = FastRCNNConvFCHead(
            (config.width, BOX_SIZE, BOX_SIZE),
            [config.width] * config.head_convs,
            [config.fc_width],
            norm_layer=AllRanksBatchNorm2d,
        )
        self.classes = nn.Linear(config.fc_width, config.num_classes + 1)
        self.boxes = nn.Linear(config.fc_width, 4 * config.num_classes)
        # mmdet's initial weights: deltas start close to zero, so boxes start as the proposals.
        for layer, std in ((self.classes, 0.01), (self.boxes, 0.001)):
            nn.init.normal_(layer.weight, std=std)
            nn.init.zeros_(layer.bias)

    def forward(self, pooled: Tensor) -> tuple[Tensor, Tensor]:
        """Map regions (R, C, 7, 7) to logits (R, classes + 1) and deltas (R, classes, 4), fp32."""
        hidden = self.trunk(pooled)
        return (
            self.classes(hidden).float(),
            self.boxes(hidden).float().view(-1, self.num_classes, 4),
        )


class MaskHead(nn.Module):
    """Convolutions without norm, a transposed one to twice the size, and one map per class."""

    def __init__(self, config: DetectorConfig) -> None:
        super().__init__()
        self.trunk = MaskRCNNHeads(config.width, [config.width] * config.head_convs, dilation=1)
        self.predictor = MaskRCNNPredictor(  # type: ignore[no-untyped-call]
            config.width, config.width, config.num_classes
        )

    def forward(self, pooled: Tensor) -> Tensor:
        """Map regions (R, C, 14, 14) to logits (R, classes, 28, 28), in fp32."""
        logits: Tensor = self.predictor(self.trunk(pooled))
        return logits.float()


def select_class(values: Tensor, labels: Tensor) -> Tensor:
    """Return, of values (R, classes, ...), those of the class of each row."""
    return values[torch.arange(len(labels), device=labels.device), labels]
