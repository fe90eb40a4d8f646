"""A small detector, its settings, objects of an image, and matching as a loop, for tests."""

import torch
from torch import Tensor
from torchvision.ops import box_iou

from mugs.models.config import ViTConfig
from mugs.models.vit import build_vit
from mugs.transfer.detection.boxes import Targets
from mugs.transfer.detection.config import DetectionConfig, DetectorConfig, Scales
from mugs.transfer.detection.detector import Detector, build_detector
from mugs.transfer.detection.matching import BACKGROUND, IGNORED

SMALL = DetectorConfig(
    num_classes=10,
    image_size=(64, 64),
    drop_path=0.2,
    width=8,
    fc_width=16,
    head_convs=1,
    rpn_samples=32,
    roi_samples=16,
    proposals_train=40,
    proposals_test=20,
)
SCALES = Scales(
    short_sides=(48, 64),
    max_side=80,
    crop_short_sides=(40, 48),
    crop_sides=(24, 40),
    test_short_side=64,
)
SETTINGS = DetectionConfig(
    detector=SMALL,
    scales=SCALES,
    epochs=2,
    batch_size=4,
    micro_batch_size=2,
    lr=1e-3,
    decay_epochs=(1,),
    warmup_steps=2,
    precision="fp32",
    threads=1,
    log_steps=2,
)


def small_detector(config: DetectorConfig = SMALL, seed: int = 0) -> Detector:
    torch.manual_seed(seed)
    shape = ViTConfig(embed_dim=16, depth=2, num_heads=2, patch_size=8, image_size=32)
    return build_detector(build_vit(shape, drop_path=config.drop_path), config, seed=seed)


def targets(num: int, key: int = 0, size: tuple[int, int] = (64, 64)) -> Targets:
    """`num` squares of 20 along the diagonal, classes 0, 1, ..."""
    low = torch.arange(num, dtype=torch.float32)[:, None].expand(-1, 2) * 15 + 2
    boxes = torch.cat([low, low + 20], dim=1)
    masks = torch.zeros(num, *size, dtype=torch.uint8)
    for mask, (x1, y1, x2, y2) in zip(masks, boxes.int().tolist(), strict=True):
        mask[y1:y2, x1:x2] = 1
    return Targets(boxes, torch.arange(num), masks, size, key)


def naive_match(
    boxes: Tensor, objects: Tensor, positive: float, negative: float, promote: float
) -> list[int]:
    """What `match` gives, object by object and box by box."""
    iou = box_iou(objects, boxes).tolist()
    result = []
    for column in range(len(boxes)):
        values = [row[column] for row in iou]
        best = max(values)
        result.append(
            values.index(best) if best >= positive else BACKGROUND if best < negative else IGNORED
        )
    for index, row in enumerate(iou):
        if max(row) >= promote:
            for column, value in enumerate(row):
                if value == max(row):
                    result[column] = index
    return result
