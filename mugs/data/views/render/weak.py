"""Weak views: crop, flip, colour jitter, grey, blur, solarize, in one compiled call."""

import numpy as np

from mugs.data.views.plan import CropPlan
from mugs.data.views.render.blur import box_weights, gaussian_blur
from mugs.data.views.render.compiled import cached_njit
from mugs.data.views.render.hue import rotate_hue
from mugs.data.views.render.photometric import (
    adjust_saturation,
    blend_with_level,
    convert_to_gray,
    mean_luma,
    solarize_planes,
)
from mugs.data.views.render.resize import resample_crop

NO_JITTER = np.empty((0, 2))


def render_weak_crop(planes: np.ndarray, crop: CropPlan, out: np.ndarray) -> None:
    """A weak view of planes (3, W, H) into out (3, S, S)."""
    jitter = np.array(crop.jitter) if crop.jitter else NO_JITTER
    radius, weight, edge = box_weights(crop.blur) if crop.blur else (-1, 0, 0)
    render_weak_kernel(
        planes, crop.box, crop.flip, jitter, crop.gray, radius, weight, edge, crop.solarize, out
    )


@cached_njit
def render_weak_kernel(
    planes: np.ndarray,
    box: tuple[int, int, int, int],
    flip: bool,
    jitter: np.ndarray,
    is_gray: bool,
    radius: int,
    weight: int,
    edge: int,
    solarized: bool,
    out: np.ndarray,
) -> None:
    """Jitter (k, 2): operation (0 brightness, 1 contrast, 2 saturation, 3 hue) and value; no blur if radius < 0."""
    resample_crop(planes, box, False, flip, out)
    for index in range(len(jitter)):
        operation, value = jitter[index, 0], jitter[index, 1]
        if operation == 0:
            blend_with_level(out, 0, value)
        elif operation == 1:
            blend_with_level(out, mean_luma(out), value)
        elif operation == 2:
            adjust_saturation(out, value)
        else:
            rotate_hue(out, int(value * 255))
    if is_gray:
        convert_to_gray(out)
    if radius >= 0:
        gaussian_blur(out, radius, weight, edge)
    if solarized:
        solarize_planes(out)
