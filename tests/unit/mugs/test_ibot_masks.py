"""Masks of iBOT as its loader draws them: published statistics, and what they depend on."""

from dataclasses import replace

import numpy as np
import pytest

from mugs.data.views.config import ViewRecipe
from mugs.data.views.plan import plan_views
from mugs.methods.config import IbotConfig
from mugs.methods.ibot import Ibot
from mugs.methods.ibot_masks import MaskShape, SampleDraws, draw_mask, draw_ratio
from mugs.models.config import ViTConfig
from mugs.random_streams import SampleStream, make_generator

SMALLEST = IbotConfig(
    arch=ViTConfig(embed_dim=24, depth=1, num_heads=2),
    head_hidden=16,
    bottleneck=8,
    num_prototypes=24,
)
PLAN = plan_views(0, 0, 0, 300, 200, ViewRecipe(large_crops="shared"))


def draw_masks(method: Ibot, sample: int, epoch: int = 0) -> np.ndarray:
    rng = make_generator(0, epoch, sample, SampleStream.ANNOTATIONS)
    return method.annotate(rng, PLAN, epoch)["masks"]


# Of released masks: share of masked patches, of crops without a mask, and among the others the mean
# and the percentiles 5, 50 and 95; then how often a patch in the middle and in a corner is masked.
PUBLISHED = [
    ("block", (0.0, 0.3), (0.0, 0.2), 0.148, 0.503, 0.297, (0.109, 0.296, 0.480), 0.28, 0.017),
    ("random", (0.0, 0.7), (0.0, 0.05), 0.353, 0.493, 0.697, (0.653, 0.694, 0.740), 0.35, 0.36),
]


@pytest.mark.parametrize("published", PUBLISHED, ids=lambda p: p[0])
def test_published_masks(published: tuple) -> None:
    shape, ratios, half_widths, share, empty, mean, percentiles, middle, corner = published
    method = Ibot(
        replace(SMALLEST, mask_shape=shape, mask_ratios=ratios, mask_half_widths=half_widths)
    )
    masks = np.concatenate([draw_masks(method, sample) for sample in range(2000)])
    assert masks.shape == (4000, 14, 14)
    shares = masks.mean(axis=(1, 2))
    some = shares[shares > 0]
    # Three standard errors of 4,000 draws.
    assert shares.mean() == pytest.approx(share, abs=0.02)
    assert (shares == 0).mean() == pytest.approx(empty, abs=0.024)
    assert some.mean() == pytest.approx(mean, abs=0.01)
    assert np.percentile(some, (5, 50, 95)) == pytest.approx(percentiles, abs=0.02)
    assert masks[:, 6:8, 6:8].mean() == pytest.approx(middle, abs=0.03)
    assert masks[:, [0, 0, 13, 13], [0, 13, 0, 13]].mean() == pytest.approx(corner, abs=0.024)
    # The two crops of an image are drawn on their own: a quarter has no mask at all.
    neither = (shares.reshape(-1, 2) == 0).all(axis=1)
    assert neither.mean() == pytest.approx(0.25, abs=0.03)


@pytest.mark.parametrize(("ratio", "least", "most"), [(0.3, 48, 58), (0.1, 12, 19), (0.5, 87, 98)])
def test_a_fixed_share_of_blocks(ratio: float, least: int, most: int) -> None:
    """Never more than the share, and mostly as many as released masks have."""
    counts = [
        draw_mask(SampleDraws(np.random.default_rng(seed)), 14, ratio, "block").sum()
        for seed in range(500)
    ]
    assert max(counts) <= ratio * 196
    assert np.percentile(counts, 5) >= least - 2
    assert max(counts) == most


@pytest.mark.parametrize("shape", ["block", "random"])
@pytest.mark.parametrize("side", [2, 4, 6, 14, 16])
def test_no_mask_exceeds_its_share(shape: MaskShape, side: int) -> None:
    """Also on tiny grids; random masks have it exactly."""
    for seed in range(100):
        draws = SampleDraws(np.random.default_rng(seed))
        ratio = draw_ratio(draws, (0.5,), (0.5,))
        mask = draw_mask(draws, side, ratio, shape)
        assert mask.shape == (side, side)
        assert mask.dtype == np.bool_
        assert mask.sum() <= ratio * side**2
        if shape == "random":
            assert mask.sum() == int(ratio * side**2)


def test_masks_are_a_function_of_the_sample() -> None:
    method = Ibot(replace(SMALLEST, mask_ratios=(0.3,), mask_half_widths=(0.2,)))
    first = draw_masks(method, 5)
    np.testing.assert_array_equal(first, draw_masks(method, 5))
    for other in (first[::-1], draw_masks(method, 6), draw_masks(method, 5, epoch=1)):
        assert (first != other).any()


def test_masks_start_at_their_epoch() -> None:
    changes = {"mask_ratios": (0.3,), "mask_half_widths": (0.2,), "mask_start_epoch": 2}
    method = Ibot(replace(SMALLEST, **changes))
    assert not draw_masks(method, 0, epoch=1).any()
    assert draw_masks(method, 0, epoch=2).any()
