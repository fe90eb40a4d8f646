"""Cascade Mask R-CNN on ViT-S/16 at full size:
a training step and the test of one image of 800 x 1056.
"""

from typing import Any

import torch
from dense_step import Measured, backbone, measured, report, rows

from mugs.engine.layer_decay import build_adamw, build_layer_decay_groups
from mugs.transfer.detection.boxes import Targets
from mugs.transfer.detection.config import DetectorConfig
from mugs.transfer.detection.detector import build_detector

SIZE = (800, 1056)
OBJECTS = 7


def objects(generator: torch.Generator) -> Targets:
    """Boxes of 60 to 360 pixels, their masks filled."""
    height, width = SIZE
    low = torch.rand(OBJECTS, 2, generator=generator) * torch.tensor([width - 361, height - 361])
    boxes = torch.cat([low, low + 60 + 300 * torch.rand(OBJECTS, 2, generator=generator)], dim=1)
    masks = torch.zeros(OBJECTS, height, width, dtype=torch.uint8)
    for mask, (x1, y1, x2, y2) in zip(masks, boxes.int().tolist(), strict=True):
        mask[y1:y2, x1:x2] = 1
    return Targets(boxes, torch.randint(0, 80, (OBJECTS,), generator=generator), masks, SIZE, 0)


def measure(attention: str, memory: str) -> Measured:
    generator = torch.Generator().manual_seed(0)
    model = build_detector(backbone(attention, memory), DetectorConfig(), seed=0).train()
    optimizer = build_adamw(build_layer_decay_groups(model, model.pyramid.vit, 0.8))
    image, target = torch.randn(1, 3, *SIZE, generator=generator), objects(generator)

    def train() -> None:
        torch.stack(list(model(image, [target]).values())).sum().backward()
        optimizer.step()

    return measured(train, lambda: model.eval().detect(image, SIZE, (480, 634)))


def run() -> list[dict[str, Any]]:
    size = f"one image of {SIZE[0]} x {SIZE[1]}"
    return rows(__file__, "detection", train=f"Cascade Mask R-CNN ViT-S/16, {size}", test=size)


if __name__ == "__main__":
    report(measure)
