"""What the methods draw of an image besides its views (`mugs.data.views.annotate`).

The workers of the loader call these functions, and import nothing of torch for them.
"""

import numpy as np
from numpy.random import Generator

from mugs.data.views.plan import ViewPlan
from mugs.methods.config import IbotConfig
from mugs.methods.ibot_masks import SampleDraws, draw_mask, draw_ratio


def annotate_strength(rng: Generator, plan: ViewPlan, epoch: int) -> dict[str, np.ndarray]:
    """Return `weak`: whether the large student crops of the image are weak."""
    return {"weak": np.array(plan.weak)}


def annotate_geometry(rng: Generator, plan: ViewPlan, epoch: int) -> dict[str, np.ndarray]:
    """Return where the large crops are, left, top, width, height, and which of them are flipped."""
    crops = plan.crops[:2]
    return {
        "boxes": np.array([crop.box for crop in crops], dtype=np.int64),
        "flips": np.array([crop.flip for crop in crops], dtype=bool),
    }


def annotate_masks(
    config: IbotConfig, patch_size: int, rng: Generator, plan: ViewPlan, epoch: int
) -> dict[str, np.ndarray]:
    """Return `masks` (2, V, V), one for each large crop of an image."""
    side = plan.crops[0].size // patch_size
    masks = np.zeros((2, side, side), dtype=bool)
    if epoch >= config.mask_start_epoch:
        draws = SampleDraws(rng)
        for crop in masks:
            ratio = draw_ratio(draws, config.mask_ratios, config.mask_half_widths)
            crop[:] = draw_mask(draws, side, ratio, config.mask_shape)
    return {"masks": masks}
