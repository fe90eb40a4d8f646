"""Regions cut out of feature maps, and the networks behind them: for class and box, and for masks.

Also the cutting of mask targets, and the pasting of masks back into an image.

Shapes: R regions, C channels.
"""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchvision.models.detection.faster_rcnn import FastRCNNConvFCHead
from torchvision.models.detection.mask_rcnn import MaskRCNNHeads, MaskRCNNPredictor
from torchvision.ops import box_area, roi_align

from mugs.models.batch_norm import AllRanksBatchNorm2d
from mugs.transfer.detection.config import DetectorConfig

# Cells per side of the regions that the two heads read (mmdet's config).
BOX_SIZE = 7
MASK_INPUT = 14
# A box is read from the level where its side spans 14 to 28 cells: from 56 pixels on at stride 4
# (mmdet's `finest_scale`).
FINEST_CELLS = 14
MASK_SIZE = 28  # cells per side of a mask target, twice the input of the mask head
PADDED_TO = 32  # sides of padded masks are multiples of this (mmdet's config)


class BoxHead(nn.Module):
    """Convolutions with batch norm, one layer of `fc_width`, then classes and deltas.

    In Mask R-CNN two such layers, and no convolution. The background is the last class. Every class
    but the background has its own deltas.
    """

    def __init__(self, config: DetectorConfig) -> None:
        super().__init__()
        self.num_classes = config.num_classes
        cascade = config.heads == "cascade"
        self.trunk = FastRCNNConvFCHead(
            (config.width, BOX_SIZE, BOX_SIZE),
            [config.width] * (config.head_convs if cascade else 0),
            [config.fc_width] * (1 if cascade else 2),
            norm_layer=AllRanksBatchNorm2d,
        )
        self.classes = nn.Linear(config.fc_width, config.num_classes + 1)
        self.boxes = nn.Linear(config.fc_width, 4 * config.num_classes)
        # mmdet's initial weights: torchvision leaves the hidden layers at torch's, with 0.42 of the
        # spread. Deltas start close to zero, so boxes start as the proposals.
        for hidden in self.trunk:
            if isinstance(hidden, nn.Linear):
                nn.init.xavier_uniform_(hidden.weight)
                nn.init.zeros_(hidden.bias)
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
        # As in mmdet; torchvision leaves them at torch's random start.
        for name in ("conv5_mask", "mask_fcn_logits"):
            nn.init.zeros_(self.predictor.get_parameter(f"{name}.bias"))

    def forward(self, pooled: Tensor) -> Tensor:
        """Map regions (R, C, 14, 14) to logits (R, classes, 28, 28), in fp32."""
        logits: Tensor = self.predictor(self.trunk(pooled))
        return logits.float()


def select_class(values: Tensor, labels: Tensor) -> Tensor:
    """Return, of values (R, classes, ...), those of the class of each row."""
    return values[torch.arange(len(labels), device=labels.device), labels]


def assign_levels(boxes: Tensor, finest_stride: int, levels: int) -> Tensor:
    """Return which map (n,) each box (n, 4) is read from: floor(log2(sqrt(area) / 56)) at stride 4.

    Results are limited to 0 ... levels - 1.
    """
    scale = box_area(boxes).clamp(min=0).sqrt() / (FINEST_CELLS * finest_stride)
    return torch.log2(scale + 1e-6).floor().clamp(0, levels - 1).long()


def pool_regions(
    maps: Sequence[Tensor], strides: Sequence[int], boxes: Sequence[Tensor], size: int
) -> Tensor:
    """Cut the boxes (r, 4) of each image out of the maps: RoIAlign (R, C, size, size).

    Boxes keep their order, image by image.
    """
    # One call per level, because torchvision's `MultiScaleRoIAlign` has no `aligned`: without it,
    # regions are shifted by half a pixel.
    rois = add_image_index(boxes)
    levels = assign_levels(rois[:, 1:], strides[0], len(maps))
    places = []
    parts = []
    for level, (features, stride) in enumerate(zip(maps, strides, strict=True)):
        place = (levels == level).nonzero()[:, 0]
        places.append(place)
        parts.append(
            roi_align(features, rois[place], size, 1 / stride, sampling_ratio=0, aligned=True)
        )
    return torch.cat(parts)[torch.cat(places).argsort()]


def add_image_index(boxes: Sequence[Tensor]) -> Tensor:
    """Turn the boxes (r, 4) of each image into (R, 5), the number of the image first."""
    numbers = [box.new_full((len(box), 1), float(index)) for index, box in enumerate(boxes)]
    return torch.cat([torch.cat(pair, dim=1) for pair in zip(numbers, boxes, strict=True)])


def cut_mask_targets(masks: Tensor, index: Tensor, boxes: Tensor) -> Tensor:
    """Cut mask `index[i]` of masks (m, H, W) out at box i of (n, 4): (n, 28, 28) of 0 and 1."""
    # As mmdet pads them with the image: RoIAlign repeats the last row beyond the edge, so without
    # zeros there, objects at the right and lower edge come out larger.
    height, width = masks.shape[1:]
    masks = F.pad(masks, (0, -width % PADDED_TO, 0, -height % PADDED_TO))
    rois = torch.cat([index[:, None].to(boxes.dtype), boxes], dim=1)
    soft = roi_align(
        masks[:, None].to(boxes.dtype), rois, MASK_SIZE, 1.0, sampling_ratio=0, aligned=True
    )
    # mmdet binarizes the targets; torchvision trains on the soft values.
    return (soft[:, 0] >= 0.5).to(boxes.dtype)


def paste_masks(
    masks: Tensor, boxes: Tensor, size: tuple[int, int], threshold: float = 0.5
) -> Tensor:
    """Paste probabilities (n, m, m) at boxes (n, 4) into bitmaps (n, H, W).

    Probabilities are interpolated bilinearly at the centers of the pixels.
    """
    height, width = size
    result = torch.zeros(len(masks), height, width, dtype=torch.bool, device=masks.device)
    for bitmap, mask, box in zip(result, masks, boxes, strict=True):
        x1, y1, x2, y2 = box.tolist()
        # Only pixels close to the box are computed: most boxes are small, and `grid_sample` gives
        # zero outside of them.
        left = max(int(x1) - 1, 0)
        top = max(int(y1) - 1, 0)
        right = min(int(x2) + 2, width)
        bottom = min(int(y2) + 2, height)
        if right > left and bottom > top and x2 > x1 and y2 > y1:
            # Pixel centers in coordinates of the box, -1 to 1, as `grid_sample` wants them.
            x = (torch.arange(left, right, device=masks.device) + 0.5 - x1) / (x2 - x1) * 2 - 1
            y = (torch.arange(top, bottom, device=masks.device) + 0.5 - y1) / (y2 - y1) * 2 - 1
            grid = torch.stack(torch.meshgrid(x, y, indexing="xy"), dim=-1)[None].to(mask.dtype)
            soft = F.grid_sample(mask[None, None], grid, align_corners=False)[0, 0]
            bitmap[top:bottom, left:right] = soft >= threshold
    return result
