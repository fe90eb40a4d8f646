"""Matching, sampling, RPN losses and proposals against naive loops and by hand."""

import math
from collections import Counter
from dataclasses import replace

import pytest
import torch
from detection_cases import naive_match
from torch import Tensor
from torchvision.models.detection._utils import Matcher
from torchvision.ops import box_iou, clip_boxes_to_image, nms

from mugs.random_streams import DetectionStream, derive_detection_key
from mugs.transfer.detection.boxes import Targets, decode_deltas, encode_deltas
from mugs.transfer.detection.config import DetectorConfig
from mugs.transfer.detection.matching import BACKGROUND, IGNORED, match_boxes, sample_matches
from mugs.transfer.detection.rpn import DELTA_STDS, RPN

CONFIG = DetectorConfig(width=8, rpn_samples=32, proposals_train=20, proposals_test=10)
STRIDES = (4, 8)


def outputs(seed: int = 0) -> tuple[list[Tensor], list[Tensor], list[Tensor]]:
    torch.manual_seed(seed)
    rpn = RPN(CONFIG, STRIDES)
    maps = [torch.randn(2, 8, 24, 32), torch.randn(2, 8, 12, 16)]
    logits, deltas, anchors = rpn(maps)
    return [x * 30 for x in logits], [x * 10 for x in deltas], anchors


def truth(key: int, *boxes: list[float]) -> Targets:
    found = torch.tensor(boxes, dtype=torch.float32).view(-1, 4)
    return Targets(
        found,
        torch.zeros(len(found), dtype=torch.long),
        torch.zeros(len(found), 90, 120),
        (90, 120),
        key,
    )


def test_layout_of_the_outputs() -> None:
    """Logit and deltas of anchor a at a cell are the channels of that anchor at that cell."""
    rpn = RPN(CONFIG, STRIDES)
    features = torch.randn(1, 8, 3, 5)
    logits, deltas, anchors = rpn([features, features])
    raw_logits, raw_deltas = rpn.head([features])
    row, column, anchor = 2, 4, 1
    place = (row * 5 + column) * 3 + anchor
    assert logits[0][0, place] == raw_logits[0][0, anchor, row, column]
    assert torch.equal(
        deltas[0][0, place], raw_deltas[0][0, 4 * anchor : 4 * anchor + 4, row, column]
    )
    assert ((anchors[1][place, :2] + anchors[1][place, 2:]) / 2).tolist() == [column * 8, row * 8]


@pytest.mark.parametrize("empty", [False, True])
def test_losses_against_a_loop(empty: bool) -> None:
    logits, deltas, anchors = outputs()
    targets = [truth(5, [10, 12, 45, 40], [50, 30, 80, 62], [100, 5, 118, 88]), truth(6)]
    if empty:
        targets = [truth(7), truth(6)]
    boxes = torch.cat(anchors)
    objectness, regression, count = 0.0, 0.0, 0
    for image, one in enumerate(targets):
        score = torch.cat([x[image] for x in logits])
        shift = torch.cat([x[image] for x in deltas])
        usable = [
            i
            for i, (x1, y1, x2, y2) in enumerate(boxes.tolist())
            if x1 >= 0 and y1 >= 0 and x2 < 120 and y2 < 90
        ]
        matched = [-1] * len(usable)
        if len(one.boxes):
            matched = naive_match(boxes[usable], one.boxes, 0.7, 0.3, 0.3)
        positive, negative = sample_matches(
            torch.tensor(matched),
            32,
            0.5,
            derive_detection_key(one.key, DetectionStream.RPN_SAMPLES),
        )
        for place in [*positive.tolist(), *negative.tolist()]:
            index, label = usable[place], matched[place]
            p = 1 / (1 + math.exp(-score[index].item()))
            objectness -= math.log(p if label >= 0 else 1 - p)
            if label >= 0:
                gap = (
                    shift[index]
                    - encode_deltas(boxes[index][None], one.boxes[label][None], DELTA_STDS)[0]
                ).abs()
                for d in gap.tolist():
                    regression += 0.5 * d * d * 9 if d < 1 / 9 else d - 0.5 / 9
            count += 1
    losses = RPN(CONFIG, STRIDES).losses(logits, deltas, anchors, targets)
    assert count == 64 and (empty or regression > 0)
    # An image without a positive anchor counts for one more.
    count += 2 if empty else 1
    assert losses["rpn_objectness"].item() == pytest.approx(objectness / count, rel=1e-4)
    assert losses["rpn_box"].item() == pytest.approx(regression / count, rel=1e-4)


def test_anchors_over_the_border_take_no_part() -> None:
    """Trap: torchvision samples them as background; here that would cost 1000 for each."""
    _, deltas, anchors = outputs()
    every = torch.cat(anchors)
    crossing = (every[:, :2] < 0).any(dim=1) | (every[:, 2] >= 120) | (every[:, 3] >= 90)
    logits = list(torch.where(crossing, 1000.0, 0.0)[None].split([len(a) for a in anchors], dim=1))
    losses = RPN(CONFIG, STRIDES).losses(logits, [x[:1] for x in deltas], anchors, [truth(3)])
    assert 0.3 < crossing.float().mean() < 0.9
    assert losses["rpn_objectness"].item() == pytest.approx(math.log(2) * 32 / 33)


def test_image_smaller_than_every_anchor() -> None:
    logits, deltas, anchors = outputs()
    small = [
        Targets(torch.zeros(0, 4), torch.zeros(0), torch.zeros(0, 8, 8), (8, 8), k) for k in (1, 2)
    ]
    losses = RPN(CONFIG, STRIDES).losses(logits, deltas, anchors, small)
    assert [v.item() for v in losses.values()] == [0, 0]


def test_each_level_is_limited_before_the_overlap_is_looked_at() -> None:
    """Of the two best anchors of a level one goes, and the third does not take its place."""
    anchors = torch.tensor([[0.0, 0, 20, 20], [0, 0, 20, 20], [50, 50, 70, 70]])
    logits, deltas = torch.tensor([[3.0, 2.0, 1.0]]), torch.zeros(1, 3, 4)
    rpn = RPN(replace(CONFIG, proposals_test=2), STRIDES).eval()
    (found,) = rpn.proposals([logits], [deltas], [anchors], [(90, 120)])
    assert found.tolist() == [[0, 0, 20, 20]]


@pytest.mark.parametrize("training", [True, False])
def test_proposals_against_a_loop(training: bool) -> None:
    logits, deltas, anchors = outputs()
    most = 20 if training else 10
    found = (
        RPN(CONFIG, STRIDES)
        .train(training)
        .proposals(logits, deltas, anchors, [(90, 120), (96, 128)])
    )
    for image, size in enumerate([(90, 120), (96, 128)]):
        kept = []
        for level in range(2):
            ranked = sorted(enumerate(logits[level][image].tolist()), key=lambda p: -p[1])[:most]
            boxes = torch.stack(
                [
                    clip_boxes_to_image(
                        decode_deltas(anchors[level][i], deltas[level][image, i], DELTA_STDS), size
                    )
                    for i, _ in ranked
                ]
            )
            scores = torch.tensor([s for _, s in ranked])
            kept += [(float(scores[k]), boxes[k].tolist()) for k in nms(boxes, scores, 0.7)]
        expected = [box for _, box in sorted(kept, key=lambda p: -p[0])[:most]]
        torch.testing.assert_close(found[image], torch.tensor(expected))
        assert len(found[image]) == most


OBJECT = torch.tensor([[0.0, 0.0, 10.0, 10.0]])


def strip(width: float) -> list[float]:
    """A box within the object whose IoU with it is width / 10."""
    return [0.0, 0.0, width, 10.0]


@pytest.mark.parametrize(
    ("positive", "negative", "expected"),
    [
        (0.7, 0.3, [0, IGNORED, IGNORED, BACKGROUND]),
        (0.5, 0.5, [0, 0, BACKGROUND, BACKGROUND]),
    ],
)
def test_thresholds_by_hand(positive: float, negative: float, expected: list[int]) -> None:
    boxes = torch.tensor([strip(7), strip(6.9), strip(3), strip(2.9)])
    matched = match_boxes(boxes, OBJECT, positive=positive, negative=negative)
    assert matched.tolist() == expected


@pytest.mark.parametrize(("width", "expected"), [(3.0, 0), (2.9, BACKGROUND)])
def test_promotion_has_a_floor(width: float, expected: int) -> None:
    """Trap: torchvision gives every object its best anchor, however bad; here an IoU of .3 is asked
    for.
    """
    boxes = torch.tensor([strip(width), strip(1)])
    matched = match_boxes(boxes, OBJECT, positive=0.7, negative=0.3, promote=0.3)
    assert matched.tolist() == [expected, BACKGROUND]
    stock = Matcher(0.7, 0.3, allow_low_quality_matches=True)(box_iou(OBJECT, boxes))
    assert stock.tolist()[0] == 0


def test_ties_are_all_promoted_and_the_last_object_wins() -> None:
    twice = torch.cat([OBJECT, OBJECT])
    boxes = torch.tensor([strip(5), [0.0, 5.0, 10.0, 10.0], strip(2)])
    assert match_boxes(boxes, twice, positive=0.7, negative=0.3, promote=0.3).tolist() == [
        1,
        1,
        BACKGROUND,
    ]


@pytest.mark.parametrize("seed", range(5))
def test_as_a_loop(seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    low = torch.randint(0, 30, (70, 2), generator=generator).float()
    boxes = torch.cat([low, low + torch.randint(3, 20, (70, 2), generator=generator)], dim=1)
    boxes, objects = boxes[:60], boxes[60:]
    ours = match_boxes(boxes, objects, positive=0.7, negative=0.3, promote=0.3)
    assert ours.tolist() == naive_match(boxes, objects, 0.7, 0.3, 0.3)
    assert {BACKGROUND, IGNORED} < set(ours.tolist())


def test_nothing_to_match() -> None:
    assert match_boxes(OBJECT, torch.zeros(0, 4), positive=0.5, negative=0.5).tolist() == [
        BACKGROUND
    ]
    assert match_boxes(torch.zeros(0, 4), OBJECT, positive=0.5, negative=0.5).tolist() == []


@pytest.mark.parametrize(
    ("positives", "background", "expected"),
    [(100, 400, (16, 48)), (5, 400, (5, 59)), (100, 10, (16, 10)), (0, 9, (0, 9))],
)
def test_sampled_numbers(positives: int, background: int, expected: tuple[int, int]) -> None:
    matched = torch.tensor([3] * positives + [BACKGROUND] * background + [IGNORED] * 50)
    found = sample_matches(matched, 64, 0.25, key=1)
    assert tuple(map(len, found)) == expected
    assert (matched[found[0]] >= 0).all() and (matched[found[1]] == BACKGROUND).all()
    assert all(len(f.unique()) == len(f) for f in found)


def test_draws_depend_on_the_key_alone_and_are_even() -> None:
    matched = torch.full((20,), BACKGROUND)
    assert torch.equal(
        sample_matches(matched, 5, 0.5, key=9)[1], sample_matches(matched, 5, 0.5, key=9)[1]
    )
    drawn = Counter(
        i for key in range(2000) for i in sample_matches(matched, 5, 0.5, key=key)[1].tolist()
    )
    assert set(drawn) == set(range(20))
    assert all(abs(n - 500) < 5 * (2000 * 0.25 * 0.75) ** 0.5 for n in drawn.values())
