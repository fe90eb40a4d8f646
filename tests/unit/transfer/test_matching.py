"""Matching and sampling against naive loops and by hand."""

from collections import Counter

import pytest
import torch
from detection_cases import naive_match
from torchvision.models.detection._utils import Matcher
from torchvision.ops import box_iou

from mugs.transfer.detection.matching import BACKGROUND, IGNORED, match_boxes, sample_matches

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
