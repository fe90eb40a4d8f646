"""Views, padding and batches of detection: by hand, and against naive pixel work."""

from pathlib import Path

import numpy as np
import pytest
import torch
from coco_cases import entry, write_coco
from numpy.random import default_rng
from torchvision.models.detection.transform import GeneralizedRCNNTransform

from mugs.data.dense.coco import CocoSplit
from mugs.data.dense.pixels import normalize_pixels
from mugs.transfer.detection.batches import (
    AspectGroupedOrder,
    iter_micro_batches,
    load_training_view,
)
from mugs.transfer.detection.config import Scales
from mugs.transfer.detection.views import (
    DetectionViewPlan,
    apply_detection_plan,
    draw_detection_plan,
    pad_batch,
)

SCALES = Scales()


def test_draws_follow_the_protocol() -> None:
    """Every branch with its share, every size, and sides of the crop that are drawn apart."""
    plans = [draw_detection_plan(default_rng(i), (480, 640), SCALES) for i in range(3000)]
    crops = [p for p in plans if p.crop is not None]
    assert (
        abs(len(crops) / 3000 - 0.5) < 0.03 and abs(sum(p.flip for p in plans) / 3000 - 0.5) < 0.03
    )
    assert {min(p.size) for p in plans if p.crop is None} == set(range(480, 801, 32))
    assert {min(p.first) for p in crops} == {400, 500, 600}
    for p in crops:
        top, left, height, width = p.crop
        assert 384 <= height <= min(600, p.first[0]) and 384 <= width <= 600
        assert 0 <= top <= p.first[0] - height and 0 <= left <= p.first[1] - width
    heights, widths = np.array([p.crop[2:] for p in crops if p.first[0] == 600]).T
    assert len(heights) > 300 and abs(np.corrcoef(heights, widths)[0, 1]) < 0.2


def test_a_crop_of_a_narrow_image_is_the_image() -> None:
    plan = next(
        p
        for i in range(50)
        if (p := draw_detection_plan(default_rng(i), (50, 500), SCALES)).crop is not None
    )
    assert plan.first[0] < 384 and plan.crop[2] == plan.first[0]


def view(plan: DetectionViewPlan) -> tuple[torch.Tensor, object]:
    image = torch.arange(40 * 60).view(1, 40, 60).expand(3, -1, -1).remainder(251).to(torch.uint8)
    boxes = torch.tensor([[10.0, 10, 30, 30], [50, 35, 60, 40]])
    masks = torch.zeros(2, 40, 60, dtype=torch.uint8)
    masks[0, 10:30, 10:30], masks[1, 35:40, 50:60] = 1, 1
    return apply_detection_plan(plan, image, boxes, torch.tensor([4, 5]), masks, key=3)


def test_flip_and_resize() -> None:
    image, targets = view(DetectionViewPlan(True, None, None, (80, 120)))
    assert image.shape == (3, 80, 120) and targets.size == (80, 120) and targets.key == 3
    assert targets.boxes.tolist() == [[60, 20, 100, 60], [0, 70, 20, 80]]
    assert targets.masks[0, 20:60, 60:100].all() and targets.masks[0].sum() == 1600
    assert targets.masks[1].sum() == 200 and targets.masks[1, 70:, :20].all()


def test_crop_drops_and_cuts_objects() -> None:
    image, targets = view(DetectionViewPlan(False, (40, 60), (20, 5, 15, 20), (30, 40)))
    assert targets.boxes.tolist() == [[10, 0, 40, 20]] and targets.labels.tolist() == [4]
    assert image.shape == (3, 30, 40) and targets.masks.shape == (1, 30, 40)
    assert targets.masks[0, :20, 10:].all() and targets.masks[0].sum() == 600


def test_an_empty_crop_is_allowed() -> None:
    image, targets = view(DetectionViewPlan(False, (40, 60), (0, 35, 8, 10), (16, 20)))
    assert image.shape == (3, 16, 20)
    assert (targets.boxes.shape, targets.masks.shape) == ((0, 4), (0, 16, 20))


def test_resize_is_bilinear_without_antialiasing() -> None:
    """Half size of columns 0, 100, 200, ...: without antialiasing each pixel is the mean of two,
    not of more.
    """
    image = (torch.arange(8) * 30).to(torch.uint8).expand(3, 4, 8).contiguous()
    plan = DetectionViewPlan(False, None, None, (2, 4))
    small, _ = apply_detection_plan(
        plan, image, torch.zeros(0, 4), torch.zeros(0), torch.zeros(0, 4, 8), key=0
    )
    assert small[0, 0].tolist() == [15, 75, 135, 195]


def test_normalized_and_padded_on_the_right_and_below() -> None:
    white = normalize_pixels(torch.full((3, 33, 64), 255, dtype=torch.uint8))
    expected = [(1 - 0.485) / 0.229, (1 - 0.456) / 0.224, (1 - 0.406) / 0.225]
    assert white[:, 0, 0].tolist() == pytest.approx(expected)
    batch = pad_batch([white, white[:, :5, :7]], 32)
    assert (
        batch.shape == (2, 3, 64, 64)
        and (batch[0, :, 33:] == 0).all()
        and (batch[1, :, :, 7:] == 0).all()
    )
    assert torch.equal(batch[1, :, :5, :7], white[:, :5, :7])


def test_images_are_resized_once_and_in_the_pipeline() -> None:
    """Trap: torchvision's transform would bring a view of 480 back to 800."""
    split_view = normalize_pixels(torch.zeros(3, 480, 640, dtype=torch.uint8))
    assert pad_batch([split_view], 32).shape == (1, 3, 480, 640)
    stock = GeneralizedRCNNTransform(800, 1333, [0.0] * 3, [1.0] * 3)
    assert stock([split_view])[0].tensors.shape[-2] == 800


def test_views_are_a_function_of_seed_epoch_and_image(tmp_path: Path) -> None:
    split = CocoSplit(write_coco(tmp_path, [entry(1, 1), entry(2, 2)]), "train")
    scales = Scales(
        short_sides=(32, 40, 48), max_side=64, crop_short_sides=(30, 40), crop_sides=(20, 30)
    )
    first, again = (load_training_view(split, 0, 1, 2, scales) for _ in range(2))
    assert torch.equal(first[0], again[0]) and torch.equal(first[1].boxes, again[1].boxes)
    others = [
        load_training_view(split, 0, seed, epoch, scales)
        for seed, epoch in ((1, 3), (2, 2), (3, 2), (1, 4))
    ]
    assert any(o[0].shape != first[0].shape or not torch.equal(o[0], first[0]) for o in others)
    assert len({o[1].key for o in [first, *others]}) == 5


WIDE = [i % 3 > 0 for i in range(50)]  # 33 wide, 17 not


@pytest.mark.parametrize("world", [1, 2, 4])
def test_passes_are_of_one_kind_and_the_same_for_any_number_of_ranks(world: int) -> None:
    """17 and 33 images make 5 + 9 passes of four; steps of four passes: four steps, and two passes
    come again.
    """
    orders = [
        AspectGroupedOrder(WIDE, seed=3, world=world, rank=r, batch_size=16, micro_batch_size=4)
        for r in range(world)
    ]
    alone = AspectGroupedOrder(WIDE, seed=3, world=1, rank=0, batch_size=16, micro_batch_size=4)
    assert alone.steps_per_epoch == 4
    seen = set()
    for step in range(4, 8):
        passes = np.concatenate([order.micro_batches(step) for order in orders])
        assert np.array_equal(passes, alone.micro_batches(step))
        for one in passes:
            assert len({WIDE[i] for i in one}) == 1
            seen |= set(one.tolist())
    assert seen == set(range(50))
    assert not np.array_equal(alone.permutation(0), alone.permutation(1))


@pytest.mark.parametrize(
    ("wide", "batch_size", "words"),
    [
        (WIDE, 12, "batch_size 12 does not divide over 2 ranks into passes of 4"),
        ([], 8, "no image to train on"),
    ],
)
def test_batches_that_cannot_be_made(wide: list[bool], batch_size: int, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        AspectGroupedOrder(wide, seed=3, world=2, rank=0, batch_size=batch_size, micro_batch_size=4)


def test_coco_epoch_has_the_steps_of_the_reference() -> None:
    """117,266 images, 32 a step: 3,665 iterations."""
    order = AspectGroupedOrder(
        [i % 4 > 0 for i in range(117_266)],
        seed=0,
        world=8,
        rank=5,
        batch_size=32,
        micro_batch_size=4,
    )
    assert order.steps_per_epoch == 3665 and order.micro_batches(7000).shape == (1, 4)


def test_passes_ahead_of_the_loop(tmp_path: Path) -> None:
    split = CocoSplit(write_coco(tmp_path, [entry(1, 1), entry(2, 2)]), "train")
    order = AspectGroupedOrder(
        [True, False], seed=0, world=1, rank=0, batch_size=4, micro_batch_size=2
    )
    scales = Scales(short_sides=(32,), max_side=64, crop_prob=0.0)
    found = list(
        iter_micro_batches(split, [0, 1], order, range(1, 3), scales=scales, multiple=16, threads=2)
    )
    assert [len(step) for step in found] == [2, 2]
    for step, passes in enumerate(found, 1):
        assert [list(p.indices) for p in passes] == order.micro_batches(step).tolist()
        for one in passes:
            assert one.images.shape in ((2, 3, 32, 48), (2, 3, 48, 32))
            assert len(one.targets) == 2 and one.targets[0].key == one.targets[1].key
