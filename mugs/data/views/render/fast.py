"""Compiled renderer: decode once, crop first, augment only what is kept; pixels as the PIL reference."""

import numpy as np
from PIL import Image

from mugs.data.views.plan import CropPlan, ViewPlan
from mugs.data.views.render import weak
from mugs.data.views.render.compiled import cached_njit
from mugs.data.views.render.randaugment import IDENTITY, LeveledImage, augment_region
from mugs.data.views.render.resize import resample_crop


def render_views_compiled(
    image: Image.Image, plan: ViewPlan, large: np.ndarray, small: np.ndarray
) -> None:
    """Write the crops of an RGB image as uint8 into large (4, 3, S, S) and small (P, 3, s, s)."""
    whole = to_planes(image)
    for index, crop in enumerate(plan.crops):
        out = large[index] if index < 4 else small[index - 4]
        render_crop_compiled(whole, crop, out)


def render_crop_compiled(whole: LeveledImage, crop: CropPlan, out: np.ndarray) -> None:
    """One crop into out (3, S, S)."""
    if crop.strong:
        render_strong_crop(whole, crop, out)
    else:
        weak.render_weak_crop(whole.planes, crop, out)


def to_planes(image: Image.Image) -> LeveledImage:
    """An RGB image as the operations want it."""
    return LeveledImage(hwc_to_cwh(np.asarray(image)), IDENTITY)


@cached_njit
def hwc_to_cwh(image: np.ndarray) -> np.ndarray:
    """(H, W, 3) -> planes (3, W, H)."""
    height, width, _ = image.shape
    out = np.empty((3, width, height), np.uint8)
    for top in range(0, height, 32):
        for x in range(width):
            for y in range(top, min(top + 32, height)):
                for channel in range(3):
                    out[channel, x, y] = image[y, x, channel]
    return out


def render_strong_crop(whole: LeveledImage, crop: CropPlan, out: np.ndarray) -> None:
    """Mirror, RandAugment on the whole image, crop."""
    if crop.operations:
        part = augment_region(whole, crop.flip, crop.operations, crop.box)
        resample_crop(part, (0, 0, crop.box[2], crop.box[3]), False, False, out)
    else:
        resample_crop(whole.planes, crop.box, crop.flip, False, out)
