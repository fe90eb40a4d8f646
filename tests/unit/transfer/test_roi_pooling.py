"""RoIAlign levels and alignment, mask targets and pasting: by hand, and against naive pixel
loops.
"""

import math

import pytest
import torch
from torch import Tensor
from torchvision.models.detection.roi_heads import paste_masks_in_image
from torchvision.ops import MultiScaleRoIAlign

from mugs.transfer.detection.heads import (
    assign_levels,
    cut_mask_targets,
    paste_masks,
    pool_regions,
)


def square(side: float) -> list[float]:
    return [0.0, 0.0, side, side]


def test_levels_by_hand() -> None:
    """56 sqrt(area) doubles from level to level: 111 is read at stride 4, 112 at 8, 224 at 16, 448
    and more at 32.
    """
    sides = [0, 10, 55, 56, 111, 112, 223, 224, 447, 448, 2000]
    levels = assign_levels(torch.tensor([square(s) for s in sides]), 4, 4)
    assert levels.tolist() == [0, 0, 0, 0, 0, 1, 1, 2, 2, 3, 3]
    assert assign_levels(torch.tensor([square(56), square(55)]), 2, 4).tolist() == [1, 0]


def ramp(size: int) -> Tensor:
    """A map whose value is the column."""
    return torch.arange(float(size)).expand(1, 1, size, size).contiguous()


def test_pooling_is_aligned() -> None:
    """Trap: without the half pixel, what torchvision's MultiScaleRoIAlign gives is half a cell too
    large.
    """
    box = torch.tensor([[8.0, 8.0, 36.0, 36.0]])
    pooled = pool_regions([ramp(16)], [4], [box], 7)
    assert pooled[0, 0, 0].tolist() == pytest.approx(
        [2 + i + 0.5 - 0.5 for i in range(7)], abs=1e-5
    )
    stock = MultiScaleRoIAlign(["0"], 7, 2)
    theirs = stock({"0": ramp(16)}, [box], [(64, 64)])
    assert (theirs[0, 0, 3, 3] - pooled[0, 0, 3, 3]).item() == pytest.approx(0.5, abs=1e-5)


def test_pooling_keeps_the_order_of_boxes_and_images() -> None:
    """Maps are constant: level and image can be read off the pooled value."""
    maps = [torch.full((2, 1, 64 // s, 64 // s), float(s)) for s in (1, 2, 4, 8)]
    for m in maps:
        m[1] += 100
    sides = [[100.0, 5.0, 30.0], [60.0, 3.0]]
    boxes = [torch.tensor([square(s) for s in part]) for part in sides]
    pooled = pool_regions(maps, [1, 2, 4, 8], boxes, 2)
    assert pooled.shape == (5, 1, 2, 2)
    assert pooled[:, 0, 0, 0].tolist() == pytest.approx([4, 1, 2, 104, 101], rel=1e-5)


def naive_target(mask: Tensor, box: list[float], size: int) -> Tensor:
    """Mean of bilinear samples, ceil(bin) of them per bin and direction; the image continues half a
    pixel outside.
    """
    height, width = mask.shape

    def at(y: float, x: float) -> float:
        if y < -1 or y > height or x < -1 or x > width:
            return 0.0
        y, x = max(y, 0.0), max(x, 0.0)
        y0, x0 = min(int(y), height - 1), min(int(x), width - 1)
        y1, x1 = min(y0 + 1, height - 1), min(x0 + 1, width - 1)
        fy, fx = (y - y0 if y0 < height - 1 else 0.0), (x - x0 if x0 < width - 1 else 0.0)
        top = mask[y0, x0] * (1 - fx) + mask[y0, x1] * fx
        return float(top * (1 - fy) + (mask[y1, x0] * (1 - fx) + mask[y1, x1] * fx) * fy)

    x1, y1, x2, y2 = (v - 0.5 for v in box)
    bin_h, bin_w = (y2 - y1) / size, (x2 - x1) / size
    count_h, count_w = math.ceil(bin_h), math.ceil(bin_w)
    out = torch.zeros(size, size)
    for i in range(size):
        for j in range(size):
            ys = [y1 + bin_h * (i + (k + 0.5) / count_h) for k in range(count_h)]
            xs = [x1 + bin_w * (j + (k + 0.5) / count_w) for k in range(count_w)]
            out[i, j] = sum(at(y, x) for y in ys for x in xs) / (count_h * count_w)
    return out


def test_mask_targets_against_a_pixel_loop() -> None:
    generator = torch.Generator().manual_seed(0)
    masks = (torch.rand(2, 50, 60, generator=generator) > 0.4).to(torch.uint8)
    boxes = torch.tensor(
        [[3.2, 4.1, 45.7, 40.3], [10.0, 2.5, 30.0, 49.0], [-4.0, 30.0, 20.0, 50.0]]
    )
    index = torch.tensor([1, 0, 1])
    found = cut_mask_targets(masks, index, boxes)
    for one, mask, box in zip(found, masks[index].float(), boxes.tolist(), strict=True):
        soft = naive_target(mask, box, 28)
        clear = (soft - 0.5).abs() > 1e-4
        assert torch.equal(one[clear], (soft >= 0.5).float()[clear]) and clear.float().mean() > 0.5


def test_mask_targets_are_zero_or_one() -> None:
    """Trap: torchvision trains on the soft values of RoIAlign."""
    mask = torch.zeros(1, 40, 40, dtype=torch.uint8)
    mask[0, :, :21] = 1
    found = cut_mask_targets(
        mask, torch.zeros(1, dtype=torch.long), torch.tensor([[0.0, 0.0, 37.0, 37.0]])
    )
    assert set(found.unique().tolist()) == {0.0, 1.0}
    assert (
        found[0, 14].tolist() == [1.0] * 16 + [0.0] * 12
    )  # the edge at 21 lies in bin 15 of 37/28 pixels, 0.89 in


def naive_paste(mask: Tensor, box: list[float], height: int, width: int) -> Tensor:
    """Bilinear value at the center of every pixel of the image; zeros around the mask."""
    size = len(mask)

    def cell(i: int, j: int) -> float:
        return float(mask[i, j]) if 0 <= i < size and 0 <= j < size else 0.0

    x1, y1, x2, y2 = box
    out = torch.zeros(height, width)
    for row in range(height):
        for column in range(width):
            v = (row + 0.5 - y1) / (y2 - y1) * size - 0.5
            u = (column + 0.5 - x1) / (x2 - x1) * size - 0.5
            i, j = math.floor(v), math.floor(u)
            fv, fu = v - i, u - j
            out[row, column] = (cell(i, j) * (1 - fu) + cell(i, j + 1) * fu) * (1 - fv) + (
                cell(i + 1, j) * (1 - fu) + cell(i + 1, j + 1) * fu
            ) * fv
    return out


def test_paste_against_a_pixel_loop() -> None:
    masks = torch.rand(3, 28, 28, generator=torch.Generator().manual_seed(1))
    boxes = torch.tensor([[2.3, 3.7, 38.2, 25.5], [0.0, 0.0, 50.0, 30.0], [45.2, 20.1, 50.0, 30.0]])
    found = paste_masks(masks, boxes, (30, 50))
    for one, mask, box in zip(found, masks, boxes.tolist(), strict=True):
        soft = naive_paste(mask, box, 30, 50)
        clear = (soft - 0.5).abs() > 1e-4
        assert torch.equal(one[clear], (soft >= 0.5)[clear])
        assert one.any() and not one.all()


def test_paste_does_not_round_boxes() -> None:
    """Trap: torchvision pastes into whole pixels of a box grown by one cell."""
    mask = torch.ones(1, 28, 28)
    box = torch.tensor([[10.3, 5.0, 20.9, 15.0]])
    found = paste_masks(mask, box, (30, 40))[0]
    assert found[10].nonzero()[:, 0].tolist() == list(
        range(10, 21)
    )  # pixel 20 has its center at 20.5
    assert found.any(dim=1).nonzero()[:, 0].tolist() == list(range(5, 15))
    narrow = torch.tensor([[10.6, 5.0, 20.4, 15.0]])
    assert paste_masks(mask, narrow, (30, 40))[0, 10].nonzero()[:, 0].tolist() == list(
        range(11, 20)
    )
    stock = paste_masks_in_image(mask[:, None], narrow, (30, 40))[0, 0] >= 0.5
    assert stock[10].nonzero()[:, 0].tolist() != list(range(11, 20))


def test_round_trip() -> None:
    """A disc, cut out as a target and pasted back, is the disc but for some pixels of its edge."""
    y, x = torch.meshgrid(torch.arange(90.0), torch.arange(120.0), indexing="ij")
    disc = ((x - 60.5).square() + (y - 42.5).square() < 30**2)[None]
    box = torch.tensor([[30.0, 12.0, 91.0, 73.0]])
    pasted = paste_masks(
        cut_mask_targets(disc.to(torch.uint8), torch.zeros(1, dtype=torch.long), box),
        box,
        (90, 120),
    )
    assert (pasted & disc).sum() / (pasted | disc).sum() > 0.97


def test_degenerate_boxes_paste_nothing() -> None:
    boxes = torch.tensor([[5.0, 5.0, 5.0, 9.0], [100.0, 5.0, 100.0, 5.0]])
    assert not paste_masks(torch.ones(2, 28, 28), boxes, (20, 30)).any()
