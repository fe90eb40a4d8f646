"""The networks behind pooled boxes: class and box, and mask."""

import torch
from torch import Tensor, nn
from torchvision.models.detection.faster_rcnn import FastRCNNConvFCHead
from torchvision.models.detection.mask_rcnn import MaskRCNNHeads, MaskRCNNPredictor

from mugs.models.batch_norm import AllRanksBatchNorm2d
from mugs.transfer.detection.config import DetectorConfig

BOX_SIZE, MASK_INPUT = 7, 14


class BoxHead(nn.Module):
    """Convolutions with batch normalisation, one layer of `fc_width`, then classes (background last) and deltas.

    Deltas are those of each class; there are none for the background.
    """

    def __init__(self, config: DetectorConfig) -> None:
        super().__init__()
        self.num_classes = config.num_classes
        shape = (config.width, BOX_SIZE, BOX_SIZE)
        convs = [config.width] * config.head_convs
        self.trunk = FastRCNNConvFCHead(
            shape, convs, [config.fc_width], norm_layer=AllRanksBatchNorm2d
        )
        self.classes = nn.Linear(config.fc_width, config.num_classes + 1)
        self.boxes = nn.Linear(config.fc_width, 4 * config.num_classes)
        for layer, std in ((self.classes, 0.01), (self.boxes, 0.001)):
            nn.init.normal_(layer.weight, std=std)
            nn.init.zeros_(layer.bias)

    def forward(self, pooled: Tensor) -> tuple[Tensor, Tensor]:
        """(R, C, 7, 7) -> logits (R, classes + 1) and deltas (R, classes, 4), in fp32."""
        hidden = self.trunk(pooled)
        deltas = self.boxes(hidden).float()
        return self.classes(hidden).float(), deltas.view(-1, self.num_classes, 4)


class MaskHead(nn.Module):
    """Convolutions without normalisation, a transposed one to twice the size, and one map for each class."""

    def __init__(self, config: DetectorConfig) -> None:
        super().__init__()
        self.trunk = MaskRCNNHeads(config.width, [config.width] * config.head_convs, dilation=1)
        self.predictor = MaskRCNNPredictor(  # type: ignore[no-untyped-call]
            config.width, config.width, config.num_classes
        )

    def forward(self, pooled: Tensor) -> Tensor:
        """(R, C, 14, 14) -> logits (R, classes, 28, 28), in fp32."""
        logits: Tensor = self.predictor(self.trunk(pooled))
        return logits.float()


def select_class(values: Tensor, labels: Tensor) -> Tensor:
    """values (R, classes, ...) of the class of each row."""
    return values[torch.arange(len(labels), device=labels.device), labels]
