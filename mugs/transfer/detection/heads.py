"""The networks behind pooled boxes: class and box, and mask."""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchvision.models.detection.faster_rcnn import FastRCNNConvFCHead
from torchvision.models.detection.mask_rcnn import MaskRCNNHeads, MaskRCNNPredictor
from torchvision.ops import roi_align

from mugs.models.batch_norm import BatchNorm2d
from mugs.transfer.detection.boxes import area
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
        self.trunk = FastRCNNConvFCHead(shape, convs, [config.fc_width], norm_layer=BatchNorm2d)
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


def of_class(values: Tensor, labels: Tensor) -> Tensor:
    """values (R, classes, ...) of the class of each row."""
    return values[torch.arange(len(labels), device=labels.device), labels]


FINEST = 14  # boxes of less than twice this many cells of the first level are read from it (56 pixels at stride 4)


MASK_SIZE = 28


def box_levels(boxes: Tensor, finest_stride: int, levels: int) -> Tensor:
    """Which map (n,) each box (n, 4) is read from: floor(log2(sqrt(area) / 56)) at strides 4 to 32, kept in range."""
    scale = area(boxes).clamp(min=0).sqrt() / (FINEST * finest_stride)
    return torch.log2(scale + 1e-6).floor().clamp(0, levels - 1).long()


def pool(
    maps: Sequence[Tensor], strides: Sequence[int], boxes: Sequence[Tensor], size: int
) -> Tensor:
    """RoIAlign (R, C, size, size) of the boxes (r, 4) of each image, images in order; aligned, adaptive sampling."""
    rois = with_image(boxes)
    levels = box_levels(rois[:, 1:], strides[0], len(maps))
    places, parts = [], []
    for level, (features, stride) in enumerate(zip(maps, strides, strict=True)):
        place = (levels == level).nonzero()[:, 0]
        places.append(place)
        parts.append(
            roi_align(features, rois[place], size, 1 / stride, sampling_ratio=0, aligned=True)
        )
    return torch.cat(parts)[torch.cat(places).argsort()]


def with_image(boxes: Sequence[Tensor]) -> Tensor:
    """Boxes of each image -> (R, 5), the number of the image first."""
    numbers = [box.new_full((len(box), 1), float(index)) for index, box in enumerate(boxes)]
    return torch.cat([torch.cat(pair, dim=1) for pair in zip(numbers, boxes, strict=True)])


def mask_targets(masks: Tensor, index: Tensor, boxes: Tensor) -> Tensor:
    """What mask `index[i]` of masks (m, H, W) looks like in box i of (n, 4): (n, 28, 28) of 0 and 1.

    RoIAlign of the bitmap, aligned, cut at one half.
    """
    rois = torch.cat([index[:, None].to(boxes.dtype), boxes], dim=1)
    soft = roi_align(
        masks[:, None].to(boxes.dtype), rois, MASK_SIZE, 1.0, sampling_ratio=0, aligned=True
    )
    return (soft[:, 0] >= 0.5).to(boxes.dtype)


def paste(masks: Tensor, boxes: Tensor, size: tuple[int, int], threshold: float = 0.5) -> Tensor:
    """Probabilities (n, m, m) on boxes (n, 4) -> bitmaps (n, H, W), bilinear at the centres of the pixels."""
    height, width = size
    result = torch.zeros(len(masks), height, width, dtype=torch.bool, device=masks.device)
    for bitmap, mask, box in zip(result, masks, boxes, strict=True):
        x1, y1, x2, y2 = box.tolist()
        left, top = max(int(x1) - 1, 0), max(int(y1) - 1, 0)
        right, bottom = min(int(x2) + 2, width), min(int(y2) + 2, height)
        if right > left and bottom > top and x2 > x1 and y2 > y1:
            x = (torch.arange(left, right, device=masks.device) + 0.5 - x1) / (x2 - x1) * 2 - 1
            y = (torch.arange(top, bottom, device=masks.device) + 0.5 - y1) / (y2 - y1) * 2 - 1
            grid = torch.stack(torch.meshgrid(x, y, indexing="xy"), dim=-1)[None].to(mask.dtype)
            soft = F.grid_sample(mask[None, None], grid, align_corners=False)[0, 0]
            bitmap[top:bottom, left:right] = soft >= threshold
    return result
