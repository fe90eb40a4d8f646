"""Losses of the stages, what one hands to the next, and inference: naive loops and numbers
by hand.
"""

import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchvision.ops import generalized_box_iou, nms

from mugs.transfer.detection.boxes import Targets, decode_deltas
from mugs.transfer.detection.cascade import (
    STAGES,
    Cascade,
    SampledBoxes,
    compute_box_losses,
    refine_proposals,
    sample_boxes,
    select_best_boxes,
)
from mugs.transfer.detection.config import DetectorConfig
from mugs.transfer.detection.heads import cut_mask_targets

CONFIG = DetectorConfig(
    num_classes=3, width=8, fc_width=16, head_convs=1, roi_samples=16, score_threshold=0.05
)
SIZE = (60, 80)


def target(boxes: list[list[float]], labels: list[int], key: int = 0) -> Targets:
    found = torch.tensor(boxes, dtype=torch.float32).view(-1, 4)
    masks = torch.zeros(len(boxes), *SIZE, dtype=torch.uint8)
    for mask, (x1, y1, x2, y2) in zip(masks, found.int().tolist(), strict=True):
        mask[y1:y2, x1:x2] = 1
    return Targets(found, torch.tensor(labels, dtype=torch.long), masks, SIZE, key)


def test_stages_of_the_protocol() -> None:
    assert [s.iou for s in STAGES] == [0.5, 0.6, 0.7]
    assert [s.weight for s in STAGES] == [1, 0.5, 0.25]
    assert [s.stds for s in STAGES] == [
        (0.1, 0.1, 0.2, 0.2),
        (0.05, 0.05, 0.1, 0.1),
        (0.033, 0.033, 0.067, 0.067),
    ]


def test_losses_by_hand() -> None:
    """One positive of two boxes. Deltas 0: its box stays 10 x 10, the object is its left half: IoU
    = GIoU = 0.5.
    """
    truth = target([[0, 0, 5, 10]], [1])
    boxes = torch.tensor([[0.0, 0.0, 10.0, 10.0], [30.0, 30.0, 50.0, 50.0]])
    sampled = SampledBoxes(
        boxes, torch.tensor([1, 3]), torch.tensor([0]), torch.tensor([False, False])
    )
    logits = torch.log(torch.tensor([[0.1, 0.6, 0.1, 0.2], [0.2, 0.2, 0.2, 0.4]]))
    losses = compute_box_losses(logits, torch.zeros(2, 3, 4), [sampled], [truth], STAGES[0])
    assert losses["class"].item() == pytest.approx(-(math.log(0.6) + math.log(0.4)) / 2)
    assert losses["box"].item() == pytest.approx(
        10 * 0.5 / 2
    )  # over both boxes, not over the positive


def naive_losses(
    logits: Tensor, deltas: Tensor, sampled: list[SampledBoxes], targets: list[Targets]
) -> tuple[float, float]:
    row, cross, giou = 0, 0.0, 0.0
    for one, truth in zip(sampled, targets, strict=True):
        for place in range(len(one.boxes)):
            label = int(one.labels[place])
            cross -= float(logits[row].log_softmax(0)[label])
            if label < 3:
                predicted = decode_deltas(one.boxes[place], deltas[row, label], STAGES[1].stds)[
                    None
                ]
                wanted = truth.boxes[one.objects[place]][None]
                giou += 1 - float(generalized_box_iou(predicted, wanted))
            row += 1
    return cross / row, 10 * giou / row


def test_losses_against_a_loop() -> None:
    """Trap: torchvision's are smooth L1 on deltas, with a row of deltas and label 0 for the
    background.
    """
    generator = torch.Generator().manual_seed(0)
    targets = [
        target([[5, 5, 30, 40], [30, 10, 70, 50]], [0, 2], key=1),
        target([[10, 10, 25, 25]], [1], key=2),
    ]
    proposals = [
        torch.cat([t.boxes + torch.randn(t.boxes.shape, generator=generator) * 2 for _ in range(4)])
        .add(torch.tensor([0.0, 0.0, 1.0, 1.0]))
        .clamp(min=0)
        for t in targets
    ]
    sampled = [
        sample_boxes(p, t, STAGES[1], 1, CONFIG) for p, t in zip(proposals, targets, strict=True)
    ]
    rows = sum(len(s.boxes) for s in sampled)
    logits = torch.randn(rows, 4, generator=generator)
    deltas = torch.randn(rows, 3, 4, generator=generator)
    losses = compute_box_losses(logits, deltas, sampled, targets, STAGES[1])
    assert (losses["class"].item(), losses["box"].item()) == pytest.approx(
        naive_losses(logits, deltas, sampled, targets), rel=1e-4
    )
    assert losses["box"].item() > 0.1


def test_draw() -> None:
    """Objects are proposals; IoU .5 is positive at the first stage and background at the second."""
    truth = target([[0, 0, 20, 20]], [2])
    proposals = torch.tensor([[0.0, 0.0, 20.0, 11.0], [50.0, 50.0, 60.0, 60.0]])
    first, second = (sample_boxes(proposals, truth, STAGES[n], n, CONFIG) for n in (0, 1))
    assert first.labels.tolist() == [2, 2, 3] and first.given.tolist() == [True, False, False]
    assert first.objects.tolist() == [0, 0]
    assert second.labels.tolist() == [2, 3, 3] and second.given.tolist() == [True, False, False]
    many = sample_boxes(proposals.repeat(40, 1), truth, STAGES[0], 0, CONFIG)
    assert (many.labels == 2).sum() == 4 and len(many.labels) == 16  # a quarter of 16


def test_next_proposals_by_hand() -> None:
    """Positives move by the deltas of their object's class, others by those of the likeliest
    class.
    """
    boxes = torch.tensor(
        [
            [0.0, 0.0, 10.0, 10.0],
            [0.0, 0.0, 10.0, 10.0],
            [40.0, 20.0, 60.0, 40.0],
            [70.0, 5.0, 79.0, 9.0],
        ]
    )
    sampled = SampledBoxes(
        boxes,
        torch.tensor([1, 1, 3, 3]),
        torch.tensor([0, 0]),
        torch.tensor([True, False, False, False]),
    )
    logits = torch.tensor([[9.0, 0, 0, 0], [9.0, 0, 0, 0], [0.0, 1, 2, 9], [3.0, 1, 2, 9]])
    deltas = torch.zeros(4, 3, 4)
    deltas[:, 0, 0], deltas[:, 1, 1], deltas[:, 2, 0] = (
        5.0,
        5.0,
        -5.0,
    )  # times 0.1: half a box right, down, left
    found = refine_proposals(logits, deltas, [sampled], [SIZE], STAGES[0])[0]
    expected = [[0, 5, 10, 15], [30, 20, 50, 40], [74.5, 5, 80, 9]]  # the last is clipped at 80
    assert found.tolist() == [pytest.approx(row) for row in expected]


class FixedHead(nn.Module):
    """Returns what it was given, and keeps what it was asked with."""

    def __init__(self, *values: Tensor) -> None:
        super().__init__()
        self.values, self.seen = values, []

    def forward(self, pooled: Tensor) -> tuple[Tensor, ...] | Tensor:
        self.seen.append(len(pooled))
        return self.values if len(self.values) > 1 else self.values[0]


def fixed(logits: list[list[float]], masks: list[float]) -> Cascade:
    """Stages with the logits of one box, no movement but 1 pixel right each, and constant mask
    probabilities.
    """
    cascade = Cascade(CONFIG, [4, 8, 16, 32])
    for number, stage in enumerate(STAGES):
        deltas = torch.zeros(1, 3, 4)
        deltas[..., 0] = 0.1 / stage.stds[0]
        cascade.box_heads[number] = FixedHead(torch.tensor([logits[number]]), deltas)
        probability = torch.full((9, 3, 28, 28), masks[number])
        cascade.mask_heads[number] = FixedHead(torch.logit(probability)[:9])
    return cascade


def test_logits_are_averaged_and_not_probabilities() -> None:
    """Logits 6, 0, 0 for class 0 average to 2: softmax over (2, 0, 0, 0) is .711; the mean
    probability is .516.
    """
    cascade = fixed([[6.0, 0, 0, 0], [0.0, 0, 0, 0], [0.0, 0, 0, 0]], [0.2, 0.6, 0.7])
    cascade.mask_heads = nn.ModuleList(FixedHead(h.values[0][:4]) for h in cascade.mask_heads)
    maps = [torch.zeros(1, 8, 64 // s, 80 // s) for s in (4, 8, 16, 32)]
    boxes, scores, labels, masks = cascade.detect(
        maps, torch.tensor([[10.0, 10.0, 20.0, 30.0]]), SIZE
    )
    best = math.exp(2) / (math.exp(2) + 3)
    assert scores.tolist() == pytest.approx([best] + [(1 - best) / 3] * 2)
    assert scores[0].item() == pytest.approx(0.7112, abs=1e-4)
    assert labels.tolist() == [0, 1, 2]
    assert boxes[0].tolist() == pytest.approx(
        [13, 10, 23, 30], abs=1e-4
    )  # three stages, one pixel each
    assert masks.unique().item() == pytest.approx(0.5)  # the mean of probabilities


def test_no_detection() -> None:
    cascade = fixed([[-9.0, -9, -9, 9.0]] * 3, [0.5] * 3)
    maps = [torch.zeros(1, 8, 64 // s, 80 // s) for s in (4, 8, 16, 32)]
    boxes, scores, labels, masks = cascade.detect(
        maps, torch.tensor([[10.0, 10.0, 20.0, 30.0]]), SIZE
    )
    assert (len(boxes), len(scores), len(labels), tuple(masks.shape)) == (0, 0, 0, (0, 28, 28))


def test_best_boxes_against_a_loop() -> None:
    generator = torch.Generator().manual_seed(3)
    low = torch.rand(60, 3, 2, generator=generator) * 30
    boxes = torch.cat([low, low + 5 + torch.rand(60, 3, 2, generator=generator) * 20], dim=-1)
    probabilities = (torch.randn(60, 4, generator=generator) * 2).softmax(dim=1)[:, :3]
    expected = []
    for k in range(3):
        rows = (probabilities[:, k] > 0.05).nonzero()[:, 0]
        kept = rows[nms(boxes[rows, k], probabilities[rows, k], 0.5)]
        expected += [(float(probabilities[r, k]), k, boxes[r, k].tolist()) for r in kept]
    expected = sorted(expected, reverse=True)[: CONFIG.max_detections]
    found, scores, labels = select_best_boxes(boxes, probabilities, CONFIG)
    assert scores.tolist() == pytest.approx([e[0] for e in expected])
    assert labels.tolist() == [e[1] for e in expected]
    assert found.tolist() == [e[2] for e in expected]
    assert 10 < len(found) < 100
    few = select_best_boxes(boxes, probabilities, DetectorConfig(max_detections=4))
    assert few[1].tolist() == scores[:4].tolist()


def test_mask_loss_is_that_of_the_objects_class() -> None:
    truth = target([[8, 8, 40, 40]], [2], key=4)
    cascade = Cascade(CONFIG, [4, 8, 16, 32])
    logits = torch.randn(2, 3, 28, 28, generator=torch.Generator().manual_seed(0))
    cascade.mask_heads = nn.ModuleList(FixedHead(logits) for _ in STAGES)
    boxes = torch.tensor([[8.0, 8.0, 40.0, 40.0], [10.0, 6.0, 42.0, 40.0]])
    sampled = sample_boxes(boxes[1:], truth, STAGES[0], 0, CONFIG)
    maps = [torch.zeros(1, 8, 64 // s, 80 // s) for s in (4, 8, 16, 32)]
    loss = cascade._mask_loss(maps, [sampled], [truth], 0)
    wanted = cut_mask_targets(truth.masks, sampled.objects, sampled.boxes)
    assert loss.item() == pytest.approx(
        F.binary_cross_entropy(logits[:, 2].sigmoid(), wanted).item(), rel=1e-5
    )


def test_background_has_no_deltas_and_is_the_last_class() -> None:
    """Trap: torchvision's predictor regresses the background too, and counts labels from 1."""
    head = Cascade(CONFIG, [4, 8, 16, 32]).box_heads[0]
    assert head.classes.out_features == 4 and head.boxes.out_features == 4 * 3
    logits, deltas = head(torch.zeros(5, 8, 7, 7))
    assert logits.shape == (5, 4) and deltas.shape == (5, 3, 4)
    sampled = sample_boxes(
        torch.tensor([[50.0, 50.0, 60.0, 60.0]]),
        target([[0, 0, 20, 20]], [0]),
        STAGES[0],
        0,
        CONFIG,
    )
    assert sampled.labels.tolist() == [0, 3]
