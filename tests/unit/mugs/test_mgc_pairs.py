"""Pairs of cells of two crops: golden geometries, and a program that takes one cell at a time."""

from pathlib import Path

import numpy as np
import pytest
import torch

from mugs.methods.mgc_pairs import PairRule, StrideRule, find_pairs

GOLDEN = Path(__file__).parents[2] / "parity" / "golden" / "mgc_tiny" / "checks.npz"
RULES = {
    "part": PairRule(14, 10, StrideRule(12, 2, 8), StrideRule(8, 2, 6)),
    "object": PairRule(7, 10, StrideRule(8, 2, 4), StrideRule(4, 1, 3)),
    "scene": PairRule(2, 2, StrideRule(1, 1, 1), StrideRule(1, 1, 1)),
}
# Equal boxes, where rounding makes neighboring cells overlap in the release.
ROUNDED = {("part", 1008)}
LONG = pytest.mark.long


def naive_pairs(boxes: np.ndarray, flips: np.ndarray, rule: PairRule) -> list[tuple[int, int, int]]:
    """All candidates (first, second, overlap * G^2) in scan order, cell by cell, in integers."""
    grid = rule.grid
    (x1, y1, w1, h1), (x2, y2, w2, h2) = boxes.tolist()
    left, top = max(x1, x2) * grid, max(y1, y2) * grid
    right, bottom = min(x1 + w1, x2 + w2) * grid, min(y1 + h1, y2 + h2) * grid
    shared = max(right - left, 0) * max(bottom - top, 0)
    union = (w1 * h1 + w2 * h2) * grid**2 - shared

    def stride(r: StrideRule) -> int:
        return min(max(r.factor * shared // union, r.least), r.most)

    def touched(start: int, size: int, low: int, high: int) -> list[int]:
        return [
            k
            for k in range(grid)
            if min(start * grid + size * (k + 1), high) > max(start * grid + size * k, low)
        ]

    found = []
    for r in touched(y1, h1, top, bottom)[:: stride(rule.rows)]:
        for c in touched(x1, w1, left, right)[:: stride(rule.columns)]:
            for big_r in range(grid):
                for big_c in range(grid):
                    high = min((y1 * grid + h1 * (r + 1)), y2 * grid + h2 * (big_r + 1), bottom)
                    low = max(y1 * grid + h1 * r, y2 * grid + h2 * big_r, top)
                    far = min(x1 * grid + w1 * (c + 1), x2 * grid + w2 * (big_c + 1), right)
                    near = max(x1 * grid + w1 * c, x2 * grid + w2 * big_c, left)
                    if high > low and far > near:
                        one = r * grid + (grid - 1 - c if flips[0] else c)
                        two = big_r * grid + (grid - 1 - big_c if flips[1] else big_c)
                        found.append((one, two, (high - low) * (far - near)))
    return found


def kept_naively(
    boxes: np.ndarray, flips: np.ndarray, rule: PairRule
) -> tuple[list[int], list[int], list[float]]:
    found = naive_pairs(boxes, flips, rule)
    if len(found) > rule.num_pairs:
        found = sorted(found, key=lambda pair: pair[2])[-rule.num_pairs :]
    areas = int((boxes[:, 2] * boxes[:, 3]).sum())
    found += [(0, 0, 0)] * (rule.num_pairs - len(found))
    return (
        [one for one, _, _ in found],
        [two for _, two, _ in found],
        [overlap / areas for _, _, overlap in found],
    )


@pytest.fixture(scope="module")
def geometries() -> tuple[dict[str, np.ndarray], np.ndarray, np.ndarray]:
    arrays = dict(np.load(GOLDEN))
    # Ours are left, top, width, height; the file has left, top, height, width.
    return arrays, arrays["P3/boxes"].astype(np.int64)[..., [0, 1, 3, 2]], arrays["P3/flips"]


@pytest.mark.parametrize("level", RULES)
def test_released_geometries(
    level: str, geometries: tuple[dict[str, np.ndarray], np.ndarray, np.ndarray]
) -> None:
    """All geometries of the release at once; one differs by rounding in the release."""
    arrays, boxes, flips = geometries
    pairs = find_pairs(torch.from_numpy(boxes), torch.from_numpy(flips), RULES[level])
    ones, twos, weights = (arrays[f"P3/{level}/{name}"] for name in ("i1", "i2", "w"))
    different = set()
    for index in range(len(boxes)):
        first, second = pairs.cells[:, index].tolist()
        shares = pairs.shares[index].numpy()
        theirs = weights[index]
        same = np.allclose(np.sort(shares), np.sort(theirs), atol=2e-6, rtol=0)
        if len(naive_pairs(boxes[index], flips[index], RULES[level])) > len(theirs):
            cut = theirs.min() + 1e-6
            ours = {(a, b) for a, b, w in zip(first, second, shares, strict=True) if w > cut}
            kept = zip(ones[index], twos[index], theirs, strict=True)
            same &= ours == {(int(a), int(b)) for a, b, w in kept if w > cut}
        else:
            same &= first == ones[index].tolist() and second == twos[index].tolist()
        if not same:
            different.add((level, index))
    assert different == {case for case in ROUNDED if case[0] == level}


@pytest.mark.parametrize(
    ("level", "every"),
    [("part", 8), ("object", 1), ("scene", 1), pytest.param("part", 1, marks=LONG)],
)
def test_cell_by_cell(
    level: str, every: int, geometries: tuple[dict[str, np.ndarray], np.ndarray, np.ndarray]
) -> None:
    """Every list in order, ties included."""
    _, boxes, flips = geometries
    chosen = slice(None, None, every)
    boxes, flips = boxes[chosen], flips[chosen]
    pairs = find_pairs(torch.from_numpy(boxes), torch.from_numpy(flips), RULES[level])
    for index in range(len(boxes)):
        first, second, shares = kept_naively(boxes[index], flips[index], RULES[level])
        assert pairs.cells[0, index].tolist() == first
        assert pairs.cells[1, index].tolist() == second
        np.testing.assert_allclose(pairs.shares[index], shares, rtol=1e-6)


EXAMPLE = {
    "part": (
        "118:80 194:142 54:2 124:72 185:153 191:146 45:13 51:6 115:83 121:76", 3.606561, 0.43601
    ),
    "object": ("34:22 10:4 12:2 31:18 33:16 11:3 31:25 32:17 33:23 32:24", 2.023126, 0.24257),
    "scene": ("1:0 3:2", 0.44806, 0.22994),
}  # fmt: skip


@pytest.mark.parametrize("level", EXAMPLE)
def test_example(level: str) -> None:
    boxes = torch.tensor([[[40, 30, 400, 300], [131, 97, 333, 291]]])
    pairs = find_pairs(boxes, torch.tensor([[False, True]]), RULES[level])
    listed = zip(*pairs.cells[:, 0].tolist(), strict=True)
    text, total, largest = EXAMPLE[level]
    assert sorted(f"{a}:{b}" for a, b in listed) == sorted(text.split())
    assert pairs.shares.sum().item() == pytest.approx(total, abs=1e-5)
    assert pairs.shares[0, -1].item() == pytest.approx(largest, abs=1e-5)


def test_pairs_do_not_depend_on_the_unit(
    geometries: tuple[dict[str, np.ndarray], np.ndarray, np.ndarray],
) -> None:
    """Nor on where the image begins: the release measures boxes in units of the first one."""
    arrays, boxes, flips = geometries
    left, top, high, wide = arrays["P2/relative"]
    # The overlap of the example, in 224ths of the first box.
    assert (left, wide) == pytest.approx(((131 - 40) * 224 / 400, 309 * 224 / 400), abs=1e-4)
    assert (top, high) == pytest.approx(((97 - 30) * 224 / 300, 233 * 224 / 300), abs=1e-4)
    some = torch.from_numpy(boxes[::16])
    flipped = torch.from_numpy(flips[::16])
    moved = some * torch.tensor([3, 5, 3, 5]) + torch.tensor([7, 2, 0, 0])
    for rule in RULES.values():
        usual, other = (find_pairs(each, flipped, rule) for each in (some, moved))
        assert torch.equal(usual.cells, other.cells)
        torch.testing.assert_close(usual.shares, other.shares)


def test_crops_that_share_nothing_have_no_pairs() -> None:
    boxes = torch.tensor([[[0, 0, 10, 10], [20, 20, 10, 10]]])
    for rule in RULES.values():
        pairs = find_pairs(boxes, torch.tensor([[True, True]]), rule)
        assert not pairs.cells.any()
        assert not pairs.shares.any()


def test_more_pairs_are_asked_for_than_there_are_cells() -> None:
    rule = PairRule(1, 3, StrideRule(1, 1, 1), StrideRule(1, 1, 1))
    pairs = find_pairs(torch.tensor([[[0, 0, 4, 4], [0, 0, 4, 4]]]), torch.zeros(1, 2) > 0, rule)
    assert pairs.shares.tolist() == [[0.5, 0.0, 0.0]]
