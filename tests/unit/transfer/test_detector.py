"""The whole detector: gradients on empty images, draws by image, sizes at the edge, precision,
recomputation.
"""

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from detection_cases import SMALL, small_detector, targets

from mugs.random_streams import make_image_key
from mugs.transfer.detection.config import Scales
from mugs.transfer.detection.detector import Detector, count_detector_flops
from mugs.transfer.detection.views import typical_view_size

IMAGES = torch.randn(2, 3, 64, 64, generator=torch.Generator().manual_seed(0))
LOSSES = {
    "rpn_objectness",
    "rpn_box",
    *(f"stage{n}_{name}" for n in (1, 2, 3) for name in ("class", "box", "mask")),
}


def test_position_table_has_the_rows_and_columns_of_the_images() -> None:
    detector = small_detector(replace(SMALL, image_size=(48, 80)))
    assert detector.pyramid.vit.position_grid == (6, 10)


@pytest.mark.parametrize("objects", [(2, 1), (0, 0), (0, 2)])
def test_every_parameter_gets_a_gradient(objects: tuple[int, int]) -> None:
    model = small_detector().train()
    losses = model(IMAGES, [targets(n, key=i) for i, n in enumerate(objects)])
    assert set(losses) == LOSSES
    torch.stack(list(losses.values())).sum().backward()
    missing = [n for n, p in model.named_parameters() if p.requires_grad and p.grad is None]
    assert not missing
    assert all(torch.isfinite(p.grad).all() for p in model.parameters() if p.grad is not None)
    if objects == (0, 0):
        assert [losses[f"stage{n}_mask"].item() for n in (1, 2, 3)] == [0, 0, 0]


def test_protocol_sizes() -> None:
    """Strides 4 to 64, three stages, 80 classes and the background, masks of 28."""
    model = small_detector(replace(SMALL, num_classes=80))
    assert model.rpn.strides == (2, 4, 8, 16, 32)  # patch 8 here: half of 4 to 64
    assert model.cascade.strides == (2, 4, 8, 16)
    assert [len(heads) for heads in (model.cascade.box_heads, model.cascade.mask_heads)] == [3, 3]
    assert model.cascade.box_heads[0].classes.out_features == 81
    assert model.cascade.mask_heads[0](torch.zeros(1, SMALL.width, 14, 14)).shape == (1, 80, 28, 28)


def losses_with(model: Detector, keys: tuple[int, int]) -> list[float]:
    model.load_state_dict(small_detector().state_dict())
    model.train()
    found = model(IMAGES, [targets(2, key=k) for k in keys])
    return [value.item() for value in found.values()]


def test_draws_are_a_function_of_the_keys() -> None:
    model = small_detector()
    keys = make_image_key(0, 1, 5), make_image_key(0, 1, 6)
    assert losses_with(model, keys) == losses_with(model, keys)
    assert losses_with(model, keys) != losses_with(model, (keys[0], make_image_key(0, 2, 6)))


def test_depth_draws_are_those_of_each_image() -> None:
    model = small_detector()
    draws = model._depth_uniforms([targets(0, key=3), targets(0, key=9)])
    alone = model._depth_uniforms([targets(0, key=9)])
    assert draws.shape == (4, 2) and torch.equal(draws[:, 1], alone[:, 0])
    many = model._depth_uniforms([targets(0, key=k) for k in range(500)])
    assert abs(many.mean().item() - 0.5) < 0.03 and many.min() >= 0 and many.max() < 1


def test_recomputation_changes_no_gradient() -> None:
    found = []
    for recompute in (False, True):
        model = small_detector().train()
        model.pyramid.vit.activation_checkpointing = recompute
        torch.stack(list(model(IMAGES, [targets(2), targets(1, key=4)]).values())).sum().backward()
        found.append([p.grad for p in model.parameters() if p.grad is not None])
    for one, other in zip(*found, strict=True):
        torch.testing.assert_close(one, other)


def test_bf16_is_near_fp32() -> None:
    plain, mixed = {}, {}
    for precision, into in (("fp32", plain), ("bf16", mixed)):
        model = small_detector().train()
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=precision == "bf16"):
            into |= {n: v for n, v in model(IMAGES, [targets(2), targets(1, key=4)]).items()}
    assert all(v.dtype == torch.float32 for v in mixed.values())
    for name in ("rpn_objectness", "rpn_box", "stage1_class"):
        assert mixed[name].item() == pytest.approx(plain[name].item(), rel=0.03)


@pytest.mark.parametrize(
    ("size", "original"), [((64, 64), (64, 64)), ((16, 1328), (5, 415)), ((320, 32), (640, 64))]
)
def test_detections_lie_in_the_original_image(
    size: tuple[int, int], original: tuple[int, int]
) -> None:
    model = small_detector(replace(SMALL, score_threshold=0.01)).eval()
    padded = torch.zeros(1, 3, -(-size[0] // 16) * 16, -(-size[1] // 16) * 16)
    padded[..., : size[0], : size[1]] = torch.randn(
        1, 3, *size, generator=torch.Generator().manual_seed(1)
    )
    found = model.detect(padded, size, original)
    assert 0 < len(found.boxes) <= SMALL.max_detections
    assert found.masks.shape == (len(found.boxes), *original)
    assert (found.boxes >= 0).all() and (found.boxes[:, 2::2] <= original[1]).all()
    assert (found.boxes[:, 1::2] <= original[0]).all()
    assert (found.scores[:-1] >= found.scores[1:]).all() and (found.scores > 0.01).all()


def test_zero_detections() -> None:
    found = (
        small_detector(replace(SMALL, score_threshold=0.99))
        .eval()
        .detect(IMAGES[:1], (64, 64), (50, 70))
    )
    assert (tuple(found.boxes.shape), tuple(found.masks.shape)) == ((0, 4), (0, 50, 70))


def test_new_weights_come_from_the_seed_and_leave_the_generator_alone() -> None:
    one, two, other = (small_detector(seed=s).state_dict() for s in (0, 0, 1))
    assert all(torch.equal(one[k], two[k]) for k in one)
    assert not torch.equal(one["rpn.head.cls_logits.weight"], other["rpn.head.cls_logits.weight"])


def test_operations_by_hand() -> None:
    """16 more boxes in each of three stages, 4 more with masks: the heads' products, forward and
    twice that back.
    """
    few, many = (
        count_detector_flops(small_detector(replace(SMALL, roi_samples=n)), (64, 96))
        for n in (16, 32)
    )
    box = 49 * 8 * 8 * 9 + 8 * 49 * 16 + 16 * 11 + 16 * 40
    mask = 14 * 14 * 8 * 8 * 9 + 14 * 14 * 8 * 8 * 4 + 28 * 28 * 8 * 10
    assert many - few == 3 * 3 * 2 * (16 * box + 4 * mask)
    assert typical_view_size(Scales(), 32) == (640, 864)


def test_nothing_private_of_torchvision_is_used() -> None:
    """Trap: torchvision.models.detection._utils may change at any release."""
    folder = Path(__file__).parents[3] / "mugs" / "transfer"
    assert not [
        p
        for p in folder.rglob("*.py")
        if "detection._utils" in p.read_text() or "import _" in p.read_text()
    ]
