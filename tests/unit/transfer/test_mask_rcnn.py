"""Mask R-CNN, of which no values of mmdetection are at hand: its parts written out box by box, and
torchvision's heads with our weights.
"""

import math
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from detection_cases import SMALL, naive_match, small_detector, targets
from torch import Tensor, nn
from torchvision.models.detection.faster_rcnn import TwoMLPHead
from torchvision.ops import nms, roi_align

from mugs.models.config import ViTConfig
from mugs.models.vit import build_vit
from mugs.random_streams import DetectionStream, derive_detection_key
from mugs.transfer.detection.boxes import Targets
from mugs.transfer.detection.cascade import MASK_RCNN_STAGES, Cascade, sample_boxes
from mugs.transfer.detection.config import DetectorConfig
from mugs.transfer.detection.detector import build_detector, count_detector_flops
from mugs.transfer.detection.heads import BoxHead, assign_levels
from mugs.transfer.detection.matching import sample_matches
from mugs.transfer.detection.rpn import RPN

MASK_RCNN = replace(SMALL, heads="mask_rcnn", normed=True)
# With as many boxes as there are, so that nothing is drawn.
ALL = replace(MASK_RCNN, num_classes=3, roi_samples=400)
SIZE = (60, 80)
STRIDES = (4, 8, 16, 32)
OBJECTS = ([[4, 6, 40, 44], [30, 10, 70, 50]], [[10, 10, 25, 25]])


def truth(boxes: list[list[int]], key: int) -> Targets:
    masks = torch.zeros(len(boxes), *SIZE, dtype=torch.uint8)
    for mask, (x1, y1, x2, y2) in zip(masks, boxes, strict=True):
        mask[y1:y2, x1 : (x1 + x2) // 2] = 1
    labels = torch.arange(len(boxes)) + 1
    return Targets(torch.tensor(boxes).float().view(-1, 4), labels, masks, SIZE, key)


def proposals(target: Targets, seed: int) -> Tensor:
    """Boxes around the objects, and some that are far from all."""
    generator = torch.Generator().manual_seed(seed)
    noise = torch.randn(12, len(target.boxes), 4, generator=generator) * 4
    near = (target.boxes + noise).view(-1, 4).clamp(0, 58)
    near = torch.cat([near[:, :2], torch.maximum(near[:, 2:], near[:, :2] + 2)], dim=1)
    return torch.cat([near, torch.tensor([[60.0, 50, 78, 58], [0, 52, 20, 59]])])


def deltas_of(box: list[float], target: list[float]) -> list[float]:
    """The deltas between two boxes, divided by 0.1 and 0.2."""
    (x1, y1, x2, y2), (u1, v1, u2, v2) = box, target
    return [
        ((u1 + u2 - x1 - x2) / 2) / (x2 - x1) / 0.1,
        ((v1 + v2 - y1 - y2) / 2) / (y2 - y1) / 0.1,
        math.log((u2 - u1) / (x2 - x1)) / 0.2,
        math.log((v2 - v1) / (y2 - y1)) / 0.2,
    ]


def region(maps: list[Tensor], image: int, box: Tensor, size: int) -> Tensor:
    level = int(assign_levels(box[None], 4, 4))
    roi = torch.cat([torch.tensor([float(image)]), box])[None]
    return roi_align(maps[level], roi, size, 1 / STRIDES[level], sampling_ratio=0, aligned=True)


@torch.no_grad()
def test_losses_against_a_loop() -> None:
    """One stage; the best box of an object stands for it from an IoU of 0.5 on, whatever else it
    overlaps.
    """
    torch.manual_seed(0)
    cascade = Cascade(ALL, STRIDES)
    head, mask_head = cascade.box_heads[0], cascade.mask_heads[0]
    torch.nn.init.normal_(head.boxes.weight, std=0.3)
    torch.nn.init.normal_(head.classes.weight, std=0.3)
    maps = [torch.randn(2, ALL.width, 64 // s, 96 // s) for s in STRIDES]
    images = [truth(boxes, key) for key, boxes in enumerate(OBJECTS)]
    proposed = [proposals(target, seed) for seed, target in enumerate(images)]
    cross = distance = 0.0
    count = 0
    mask_losses = []
    for image, (boxes, target) in enumerate(zip(proposed, images, strict=True)):
        # Each object's own box comes first and stands for it.
        matched = [*range(len(target.boxes)), *naive_match(boxes, target.boxes, 0.5, 0.5, 0.5)]
        # A quarter of 400 may be positive, so that all are taken.
        assert 3 < sum(m >= 0 for m in matched) <= 100
        for box, index in zip(torch.cat([target.boxes, boxes]), matched, strict=True):
            count += 1
            logits, deltas = head(region(maps, image, box, 7))
            label = int(target.labels[index]) if index >= 0 else 3
            cross -= float(logits[0].log_softmax(0)[label])
            if index < 0:
                continue
            wanted = deltas_of(box.tolist(), target.boxes[index].tolist())
            distance += sum(
                abs(a - b) for a, b in zip(deltas[0, label].tolist(), wanted, strict=True)
            )
            logits = mask_head(region(maps, image, box, 14))[0, label]
            padded = F.pad(target.masks[index].float(), (0, 16, 0, 4))[None, None]
            roi = torch.cat([torch.zeros(1), box])[None]
            soft = roi_align(padded, roi, 28, 1.0, sampling_ratio=0, aligned=True)
            mask_losses.append(
                F.binary_cross_entropy(logits.sigmoid(), (soft[0, 0] >= 0.5).float()).item()
            )
    losses = {n: v.item() for n, v in cascade.losses(maps, proposed, images).items()}
    assert losses == {
        "stage1_class": pytest.approx(cross / count, rel=1e-5),
        "stage1_box": pytest.approx(distance / count, rel=1e-5),
        "stage1_mask": pytest.approx(sum(mask_losses) / len(mask_losses), rel=1e-5),
    }


def test_the_best_box_of_an_object_stands_for_it() -> None:
    """The box overlaps more with the second object, and is the best there is for the first."""
    target = truth([[0, 0, 20, 20], [0, 4, 20, 24]], 0)
    box = torch.tensor([[0.0, 3.0, 20.0, 23.0]])
    found = sample_boxes(box, target, MASK_RCNN_STAGES[0], 0, ALL)
    # IoU 0.74 with the first and 0.90 with the second, which is the last of those it is best for.
    assert found.objects.tolist() == [0, 1, 1]
    other = torch.tensor([[0.0, 3.0, 20.0, 23.0], [0.0, 4.0, 20.0, 24.0]])
    found = sample_boxes(other, target, MASK_RCNN_STAGES[0], 0, ALL)
    assert found.objects.tolist() == [0, 1, 0, 1]


def test_box_head_is_two_layers() -> None:
    """As torchvision's, whose hidden layers have other initial weights."""
    torch.manual_seed(0)
    config = DetectorConfig(heads="mask_rcnn")
    head = BoxHead(config)
    assert [tuple(p.shape) for p in head.parameters()] == [
        (1024, 256 * 49),
        (1024,),
        (1024, 1024),
        (1024,),
        (81, 1024),
        (81,),
        (320, 1024),
        (320,),
    ]
    stock = TwoMLPHead(256 * 49, 1024)
    for layer, ours in ((stock.fc6, head.trunk[1]), (stock.fc7, head.trunk[3])):
        # Xavier: uniform up to sqrt(6 / (inputs + outputs)).
        most = math.sqrt(6 / sum(ours.weight.shape))
        assert 0.99 * most < ours.weight.abs().max() <= most and not ours.bias.any()
        layer.load_state_dict(ours.state_dict())
    pooled = torch.randn(3, 256, 7, 7)
    hidden = stock(pooled)
    logits, deltas = head(pooled)
    assert torch.equal(logits, head.classes(hidden))
    assert torch.equal(deltas.flatten(1), head.boxes(hidden))


def test_detections_against_a_loop() -> None:
    torch.manual_seed(1)
    cascade = Cascade(replace(ALL, max_detections=12), STRIDES).eval()
    head = cascade.box_heads[0]
    torch.nn.init.normal_(head.boxes.weight, std=0.3)
    torch.nn.init.normal_(head.classes.weight, std=0.8)
    maps = [torch.randn(1, ALL.width, 64 // s, 96 // s) for s in STRIDES]
    boxes = proposals(truth(OBJECTS[0], 0), seed=0)
    candidates = []
    for box in boxes:
        logits, deltas = head(region(maps, 0, box, 7))
        x1, y1, x2, y2 = box.tolist()
        for label, probability in enumerate(logits[0].softmax(0)[:3].tolist()):
            dx, dy, dw, dh = deltas[0, label].tolist()
            x, y = (x1 + x2) / 2 + 0.1 * dx * (x2 - x1), (y1 + y2) / 2 + 0.1 * dy * (y2 - y1)
            w, h = (x2 - x1) * math.exp(0.2 * dw) / 2, (y2 - y1) * math.exp(0.2 * dh) / 2
            sides = [max(x - w, 0), max(y - h, 0), min(x + w, 80), min(y + h, 60)]
            if probability > 0.05:
                candidates.append((probability, label, sides))
    kept = []
    for label in range(3):
        own = sorted([c for c in candidates if c[1] == label], reverse=True)
        scores = torch.tensor([c[0] for c in own])
        kept += [own[i] for i in nms(torch.tensor([c[2] for c in own]), scores, 0.5)]
    kept = sorted(kept, reverse=True)[:12]
    with torch.no_grad():
        found, scores, labels, masks = cascade.detect(maps, boxes, SIZE)
        for row, (probability, label, sides) in enumerate(kept):
            assert scores[row].item() == pytest.approx(probability, rel=1e-4)
            assert labels[row].item() == label
            assert found[row].tolist() == pytest.approx(sides, abs=1e-3)
            logits = cascade.mask_heads[0](region(maps, 0, found[row], 14))[0, label]
            torch.testing.assert_close(masks[row], logits.sigmoid())
    assert len(found) == len(kept) == 12


# Proposals.


def rpn_outputs(config: DetectorConfig) -> tuple[RPN, list[Tensor], list[Tensor], list[Tensor]]:
    torch.manual_seed(0)
    rpn = RPN(config, (4, 8))
    logits, deltas, anchors = rpn([torch.randn(1, 8, 32, 48), torch.randn(1, 8, 16, 24)])
    return rpn, [x * 30 for x in logits], [x * 10 for x in deltas], anchors


def test_rpn_losses_against_a_loop() -> None:
    """L1, and all anchors whose center is in the image with its own padding, to 96 x 128; the maps
    are of 128 x 192.
    """
    rpn, logits, deltas, anchors = rpn_outputs(replace(MASK_RCNN, rpn_samples=64))
    boxes = torch.cat(anchors)
    target = Targets(
        torch.tensor([[0.0, 12, 45, 40], [100, 60, 118, 88]]),
        torch.zeros(2).long(),
        torch.zeros(2, 90, 120),
        (90, 120),
        key=5,
    )
    usable = [
        i
        for i, (x1, y1, x2, y2) in enumerate(boxes.tolist())
        if round((x1 + x2) / 2) < 128 and round((y1 + y2) / 2) < 96
    ]
    assert len(usable) == 3 * (24 * 32 + 12 * 16)
    matched = naive_match(boxes[usable], target.boxes, 0.7, 0.3, 0.3)
    key = derive_detection_key(5, DetectionStream.RPN_SAMPLES)
    positive, negative = sample_matches(torch.tensor(matched), 64, 0.5, key)
    objectness = distance = 0.0
    crossing = 0
    for place in [*positive.tolist(), *negative.tolist()]:
        x1, y1, x2, y2 = box = boxes[usable[place]].tolist()
        crossing += min(x1, y1) < 0 or x2 >= 120 or y2 >= 90
        p = torch.cat(logits, 1)[0, usable[place]].sigmoid().item()
        objectness -= math.log(p if matched[place] >= 0 else 1 - p)
        if matched[place] >= 0:
            wanted = deltas_of(box, target.boxes[matched[place]].tolist())
            wanted = [v * s for v, s in zip(wanted, (0.1, 0.1, 0.2, 0.2), strict=True)]
            found = torch.cat(deltas, 1)[0, usable[place]].tolist()
            distance += sum(abs(a - b) for a, b in zip(found, wanted, strict=True))
    losses = rpn.losses(logits, deltas, anchors, [target])
    assert crossing > 10 and distance > 0
    assert losses["rpn_objectness"].item() == pytest.approx(objectness / 64, rel=1e-4)
    assert losses["rpn_box"].item() == pytest.approx(distance / 64, rel=1e-4)


def test_fewer_proposals_of_an_image_than_of_a_level() -> None:
    """The limit holds in training alone; the proposals are the best of those of all levels."""
    many, few = (
        replace(MASK_RCNN, proposals_train=60, proposals_test=60, proposals_train_image=most)
        for most in (None, 40)
    )
    size = [(128, 192)]
    rpn, *outputs = rpn_outputs(many)
    (expected,) = rpn.proposals(*outputs, size)
    rpn, *outputs = rpn_outputs(few)
    (found,) = rpn.proposals(*outputs, size)
    (tested,) = rpn.eval().proposals(*outputs, size)
    assert len(expected) == 60 and torch.equal(found, expected[:40])
    assert torch.equal(tested, expected)


# The whole detector.


@pytest.mark.parametrize("objects", [(2, 1), (0, 0)])
def test_every_parameter_gets_a_gradient(objects: tuple[int, int]) -> None:
    """The final LayerNorm of the ViT too, which the cascade does not use."""
    model = small_detector(MASK_RCNN).train()
    images = torch.randn(2, 3, 64, 64)
    losses = model(images, [targets(n, key=i) for i, n in enumerate(objects)])
    heads = {f"stage1_{name}" for name in ("class", "box", "mask")}
    assert set(losses) == {"rpn_objectness", "rpn_box"} | heads
    torch.stack(list(losses.values())).sum().backward()
    missing = [n for n, p in model.named_parameters() if not p.requires_grad or p.grad is None]
    assert not missing and "pyramid.vit.norm.weight" in dict(model.named_parameters())
    assert all(torch.isfinite(p.grad).all() for p in model.parameters() if p.grad is not None)


def test_parameters_of_the_protocol() -> None:
    """Counted by hand from the layers: FPN, RPN, box head, mask head."""
    shape = ViTConfig(embed_dim=384, depth=1, num_heads=8, patch_size=16, image_size=32)
    model = build_detector(build_vit(shape), DetectorConfig(heads="mask_rcnn"), seed=0)

    def count(module: nn.Module) -> int:
        return sum(p.numel() for p in module.parameters())

    assert count(model.fpn) == 4 * (384 * 256 + 256) + 4 * (9 * 256 * 256 + 256)
    assert count(model.rpn) == 9 * 256**2 + 256 + 256 * 3 + 3 + 256 * 12 + 12
    box = 256 * 49 * 1024 + 1024 + 1024**2 + 1024 + 1024 * (81 + 320) + 81 + 320
    mask = 4 * (9 * 256**2 + 256) + 4 * 256**2 + 256 + 256 * 80 + 80
    assert count(model.cascade) == box + mask


def test_operations_by_hand() -> None:
    """16 more boxes, and 4 more masks."""
    few, many = (
        count_detector_flops(small_detector(replace(MASK_RCNN, roi_samples=n)), (64, 96))
        for n in (16, 32)
    )
    box = 8 * 49 * 16 + 16 * 16 + 16 * 11 + 16 * 40
    mask = 14 * 14 * 8 * 8 * 9 + 14 * 14 * 8 * 8 * 4 + 28 * 28 * 8 * 10
    assert many - few == 3 * 2 * (16 * box + 4 * mask)
