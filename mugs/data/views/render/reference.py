"""PIL renderer: the released semantics, and the oracle for faster ones."""

from collections.abc import Callable

import numpy as np
from PIL import Image, ImageEnhance, ImageFilter, ImageOps

from mugs.data.views.plan import CropPlan, Operation, ViewPlan

FILL = (124, 116, 104)
Affine = tuple[float, float, float, float, float, float]


def render_views_pil(
    image: Image.Image, plan: ViewPlan, large: np.ndarray, small: np.ndarray
) -> None:
    """Write the crops of an RGB image as uint8 into large (4, 3, S, S) and small (P, 3, s, s)."""
    for index, crop in enumerate(plan.crops):
        pixels = np.asarray(render_crop_pil(image, crop)).transpose(2, 0, 1)
        if index < 4:
            large[index] = pixels
        else:
            small[index - 4] = pixels


def render_crop_pil(image: Image.Image, crop: CropPlan) -> Image.Image:
    """One crop (size x size, RGB). Erasing is left to the device, where its noise is drawn."""
    return _strong(image, crop) if crop.strong else _weak(image, crop)


def crop_and_resize(image: Image.Image, crop: CropPlan) -> Image.Image:
    """Box, then bicubic resize with antialiasing, as torchvision does it."""
    left, top, width, height = crop.box
    return resize_pil(image.crop((left, top, left + width, top + height)), crop.size, crop.size)


def resize_pil(
    image: Image.Image,
    width: int,
    height: int,
    *,
    resample: Image.Resampling = Image.Resampling.BICUBIC,
) -> Image.Image:
    """With antialiasing, rows first. (From Pillow 13 on, one call may take the columns first.)"""
    return image.resize((width, image.height), resample).resize((width, height), resample)


def _strong(image: Image.Image, crop: CropPlan) -> Image.Image:
    if crop.flip:
        image = ImageOps.mirror(image)
    for operation in crop.operations:
        image = apply_operation_pil(image, operation)
    return crop_and_resize(image, crop)


def _weak(image: Image.Image, crop: CropPlan) -> Image.Image:
    out = crop_and_resize(image, crop)
    if crop.flip:
        out = ImageOps.mirror(out)
    for operation, value in crop.jitter:
        out = JITTER[operation](out, value)
    if crop.gray:
        out = out.convert("L").convert("RGB")
    if crop.blur:
        out = out.filter(ImageFilter.GaussianBlur(crop.blur))
    return ImageOps.solarize(out, 128) if crop.solarize else out


def _hue(image: Image.Image, shift: float) -> Image.Image:
    hue, saturation, value = image.convert("HSV").split()
    moved = np.asarray(hue) + np.uint8(int(shift * 255) % 256)
    return Image.merge("HSV", (Image.fromarray(moved), saturation, value)).convert("RGB")


JITTER: tuple[Callable[[Image.Image, float], Image.Image], ...] = (
    lambda image, value: ImageEnhance.Brightness(image).enhance(value),
    lambda image, value: ImageEnhance.Contrast(image).enhance(value),
    lambda image, value: ImageEnhance.Color(image).enhance(value),
    _hue,
)
ENHANCE = {
    "color": ImageEnhance.Color,
    "contrast": ImageEnhance.Contrast,
    "brightness": ImageEnhance.Brightness,
    "sharpness": ImageEnhance.Sharpness,
}


def apply_operation_pil(image: Image.Image, operation: Operation) -> Image.Image:
    """One RandAugment operation on a whole image."""
    name, value = operation.name, operation.value
    if name in ENHANCE:
        return ENHANCE[name](image).enhance(value)
    if name == "auto_contrast":
        return ImageOps.autocontrast(image)
    if name == "equalize":
        return ImageOps.equalize(image)
    if name == "invert":
        return ImageOps.invert(image)
    if name == "posterize":
        mask = (0xFF << (8 - int(value))) & 0xFF  # 0 bits: a black image, where Pillow refuses
        return image.point([level & mask for level in range(256)] * 3)
    if name == "solarize":
        return ImageOps.solarize(image, int(value))
    if name == "solarize_add":
        table = [min(255, level + int(value)) if level < 128 else level for level in range(256)]
        return image.point(table * 3)
    return _geometric(image, operation)


def _geometric(image: Image.Image, operation: Operation) -> Image.Image:
    resample = Image.Resampling.BICUBIC if operation.bicubic else Image.Resampling.BILINEAR
    if operation.name == "rotate":
        return image.rotate(operation.value, resample=resample, fillcolor=FILL)
    value, (width, height) = operation.value, image.size
    matrices: dict[str, Affine] = {
        "shear_x": (1, value, 0, 0, 1, 0),
        "shear_y": (1, 0, 0, value, 1, 0),
        "translate_x": (1, 0, value * width, 0, 1, 0),
        "translate_y": (1, 0, 0, 0, 1, value * height),
    }
    return image.transform(
        image.size,
        Image.Transform.AFFINE,
        matrices[operation.name],
        resample=resample,
        fillcolor=FILL,
    )
