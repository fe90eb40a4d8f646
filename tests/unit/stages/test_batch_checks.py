"""The arithmetic of batches over ranks, groups and micro-batches, at its boundaries."""

import pytest

from pipeline.spec import Resources
from stages.shared.batch_checks import (
    check_batch_is_filled,
    check_even_batch,
    check_even_pairs,
    check_even_passes,
)


def over(nodes: int, ranks_per_node: int) -> Resources:
    return Resources(nodes=nodes, ranks_per_node=ranks_per_node)


def test_a_batch_of_all_images_is_filled() -> None:
    check_batch_is_filled(1000, 1000)
    with pytest.raises(ValueError, match="batch_size 1001 is more than all 1,000 training images"):
        check_batch_is_filled(1001, 1000)


@pytest.mark.parametrize(
    ("batch_size", "resources", "words"),
    [
        (48, over(3, 8), ""),
        (50, over(3, 8), r"over 3 x 8 = 24 ranks leaves 2\.08 images each.*nearest: 48 or 72"),
        (50, over(1, 24), r"over 24 ranks leaves 2\.08 images each"),
        (7, over(1, 8), r"leaves 0\.88 images each; expected a multiple of 8 \(nearest: 8\)"),
    ],
)
def test_batches_over_ranks(batch_size: int, resources: Resources, words: str) -> None:
    if not words:
        check_even_batch(batch_size, resources)
        return
    with pytest.raises(ValueError, match=words):
        check_even_batch(batch_size, resources)


@pytest.mark.parametrize(
    ("batch_size", "resources", "group", "words"),
    [
        (64, over(1, 8), None, ""),
        (64, over(1, 8), 16, ""),
        (64, over(1, 8), 24, "batch_size 64 does not divide into groups of 24"),
        (72, over(3, 8), None, "3 x 8 = 24 ranks leaves 3 images each, which are mixed in pairs"),
    ],
)
def test_pairs(batch_size: int, resources: Resources, group: int | None, words: str) -> None:
    if not words:
        check_even_pairs(batch_size, resources, group)
        return
    with pytest.raises(ValueError, match=words):
        check_even_pairs(batch_size, resources, group)


@pytest.mark.parametrize(
    ("micro_batch_size", "single_pass", "words"),
    [
        (None, True, ""),
        (12, True, ""),
        (12, False, ""),
        (13, False, ""),
        (6, False, ""),
        (6, True, "2 ranks leaves 12 images each, more than micro_batch_size 6, and batch normal"),
        (8, False, r"cuts into 1\.50 passes; expected a divisor of 12 \(nearest below: 6\)"),
        (5, False, r"cuts into 2\.40 passes; expected a divisor of 12 \(nearest below: 4\)"),
    ],
)
def test_micro_batches_of_twelve_images(
    micro_batch_size: int | None, single_pass: bool, words: str
) -> None:
    if not words:
        check_even_passes(24, over(1, 2), micro_batch_size, single_pass=single_pass)
        return
    with pytest.raises(ValueError, match=words):
        check_even_passes(24, over(1, 2), micro_batch_size, single_pass=single_pass)
