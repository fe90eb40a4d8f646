"""Weak views: crop, flip, color jitter, gray, blur and solarization, in one compiled call."""

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


def render_weak_crop(planes: np.ndarray, crop: CropPlan, out: np.ndarray) -> None:
    """Write a weak view of planes (3, W, H) into out (3, S, S)."""
    jitter = np.array(crop.jitter, dtype=np.float64).reshape(-1, 2)
    radius, weight, edge = box_weights(crop.blur) if crop.blur else (-1, 0, 0)
    # A single call from Python to compiled code: each one costs some microseconds with the
    # interpreter lock held, and a batch makes hundreds.
    render_weak_kernel(
        planes,
        crop.box,
        crop.flip,
        crop.bilinear,
        jitter,
        crop.gray,
        radius,
        weight,
        edge,
        crop.solarize,
        out,
    )


@cached_njit
def render_weak_kernel(
    planes: np.ndarray,
    box: tuple[int, int, int, int],
    flip: bool,
    bilinear: bool,
    jitter: np.ndarray,
    gray: bool,
    radius: int,
    weight: int,
    edge: int,
    solarize: bool,
    out: np.ndarray,
) -> None:
    """Crop, then apply the operations in the order of torchvision's transforms.

    Jitter (k, 2) holds operations (0 brightness, 1 contrast, 2 saturation, 3 hue) and their values,
    in order. radius, weight and edge are those of `box_weights`; there is no blur if radius < 0.
    """
    resample_crop(planes, box, False, flip, bilinear, out)
    for index in range(len(jitter)):
        operation = jitter[index, 0]
        value = jitter[index, 1]
        if operation == 0:
            blend_with_level(out, 0, value)
        elif operation == 1:
            blend_with_level(out, mean_luma(out), value)
        elif operation == 2:
            adjust_saturation(out, value)
        else:
            # torchvision turns the share of a full turn into steps by 255, not 256.
            rotate_hue(out, int(value * 255))
    if gray:
        convert_to_gray(out)
    if radius >= 0:
        gaussian_blur(out, radius, weight, edge)
    if solarize:
        solarize_planes(out)
