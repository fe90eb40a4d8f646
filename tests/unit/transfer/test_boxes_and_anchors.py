"""Box coding, GIoU and anchors: numbers by hand, torchvision where it agrees, and where it must
not.
"""

import math

import pytest
import torch
from torchvision.models.detection._utils import BoxCoder
from torchvision.models.detection.anchor_utils import AnchorGenerator
from torchvision.models.detection.image_list import ImageList
from torchvision.ops import generalized_box_iou

from mugs.transfer.detection.boxes import decode_deltas, encode_deltas, generalized_iou
from mugs.transfer.detection.cascade import STAGES
from mugs.transfer.detection.rpn import build_level_anchors, inside_image

CPU = torch.device("cpu")
STDS = STAGES[0].stds


def random_boxes(n: int, seed: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    low = torch.rand(n, 2, generator=generator) * 100
    return torch.cat([low, low + 1 + torch.rand(n, 2, generator=generator) * 60], dim=1)


def test_coding_by_hand() -> None:
    """Box of 10 x 20 at (0, 0), target 20 x 10 with its center at (15, 5): shifts 1, -0.25, log
    sizes ln 2, -ln 2.
    """
    box, target = torch.tensor([[0.0, 0.0, 10.0, 20.0]]), torch.tensor([[5.0, 0.0, 25.0, 10.0]])
    expected = [1 / 0.1, -0.25 / 0.1, math.log(2) / 0.2, -math.log(2) / 0.2]
    assert encode_deltas(box, target, STDS)[0].tolist() == pytest.approx(expected)
    assert decode_deltas(box, torch.tensor([expected]), STDS)[0].tolist() == pytest.approx(
        [5, 0, 25, 10], abs=1e-5
    )


def test_coding_is_torchvisions_where_nothing_is_clamped() -> None:
    boxes, targets = random_boxes(50, 0), random_boxes(50, 1)
    coder = BoxCoder(tuple(1 / s for s in STDS))
    deltas = encode_deltas(boxes, targets, STDS)
    torch.testing.assert_close(deltas, coder.encode([targets], [boxes])[0], rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(decode_deltas(boxes, deltas, STDS), targets, rtol=1e-4, atol=1e-4)


def test_small_log_sizes_are_clamped_too() -> None:
    """Trap: torchvision clamps large ones only, and would return a box of e^-10 of the size."""
    box = torch.tensor([[0.0, 0.0, 1000.0, 1000.0]])
    for log_size, side in ((-10.0, 16.0), (10.0, 62500.0)):
        deltas = torch.tensor([[0.0, 0.0, log_size, log_size]])
        found = decode_deltas(box, deltas, (1, 1, 1, 1))
        assert (found[0, 2] - found[0, 0]).item() == pytest.approx(side, rel=1e-4)
    stock = BoxCoder((1.0, 1.0, 1.0, 1.0)).decode(torch.tensor([[0.0, 0.0, -10.0, -10.0]]), [box])[
        0, 0
    ]
    assert (stock[2] - stock[0]).item() < 0.1


def test_decoding_for_each_class() -> None:
    boxes, deltas = (
        random_boxes(7, 2),
        torch.randn(7, 3, 4, generator=torch.Generator().manual_seed(0)),
    )
    every = decode_deltas(boxes[:, None], deltas, STDS)
    for k in range(3):
        torch.testing.assert_close(every[:, k], decode_deltas(boxes, deltas[:, k], STDS))


def test_giou_by_hand_and_as_torchvision() -> None:
    """Unit squares side by side, a gap of one between: IoU 0, hull 3, union 2, so -1/3."""
    left, right = torch.tensor([[0.0, 0.0, 1.0, 1.0]]), torch.tensor([[2.0, 0.0, 3.0, 1.0]])
    assert generalized_iou(left, right).item() == pytest.approx(-1 / 3)
    half = torch.tensor([[0.0, 0.0, 2.0, 1.0]])
    assert generalized_iou(left, half).item() == pytest.approx(0.5)
    boxes, targets = random_boxes(40, 3), random_boxes(40, 4)
    torch.testing.assert_close(
        generalized_iou(boxes, targets), generalized_box_iou(boxes, targets).diag()
    )


def test_giou_of_a_point_is_finite() -> None:
    point = torch.tensor([[5.0, 5.0, 5.0, 5.0]], requires_grad=True)
    value = generalized_iou(point, point.detach())
    value.sum().backward()
    assert torch.isfinite(value).all() and torch.isfinite(point.grad).all()


def test_anchors_by_hand() -> None:
    """Stride 4: squares of 32 about the cell's top left corner, and 45.25 x 22.63; nothing is
    rounded.
    """
    anchors = build_level_anchors(2, 3, 4, CPU).view(2, 3, 3, 4)
    assert anchors[0, 0, 1].tolist() == [-16, -16, 16, 16]
    wide = [-16 * math.sqrt(2), -16 / math.sqrt(2), 16 * math.sqrt(2), 16 / math.sqrt(2)]
    assert anchors[0, 0, 0].tolist() == pytest.approx(wide)
    assert anchors[0, 0, 2].tolist() == pytest.approx([wide[1], wide[0], wide[3], wide[2]])
    assert anchors[1, 2, 1].tolist() == [8 - 16, 4 - 16, 8 + 16, 4 + 16]


def test_strides_do_not_follow_the_image() -> None:
    """Trap: at 800 x 1008 torchvision takes 61 x 63 for the stride 64 of the last level, and rounds
    sizes.
    """
    ours = build_level_anchors(13, 16, 64, CPU)
    centers = (ours[:, :2] + ours[:, 2:]) / 2
    assert centers[-1].tolist() == [15 * 64, 12 * 64]
    stock = AnchorGenerator(sizes=((512,),), aspect_ratios=((0.5, 1.0, 2.0),))
    images = ImageList(torch.zeros(1, 3, 800, 1008), [(800, 1008)])
    theirs = stock(images, [torch.zeros(1, 1, 13, 16)])[0]
    assert theirs.shape == ours.shape and (theirs - ours).abs().max().item() == pytest.approx(
        36, abs=0.5
    )


def test_inside() -> None:
    boxes = torch.tensor(
        [[0.0, 0, 10, 10], [-0.1, 0, 5, 5], [0, 0, 20, 5], [0, 0, 19.9, 9], [0, 0, 5, 30]]
    )
    assert inside_image(boxes, (30, 20)).tolist() == [True, False, False, True, False]
