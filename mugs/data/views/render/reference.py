"""PIL renderer: defines the pixels, as the released code does; the compiled one is tested on it."""

from collections.abc import Callable

import numpy as np
from PIL import Image, ImageEnhance, ImageFilter, ImageOps

from mugs.data.views.plan import CropPlan, Operation, ViewPlan

# ImageNet's mean color, 255 * (0.485, 0.456, 0.406), which timm and the released code fill with.
FILL = (124, 116, 104)


def render_views_pil(
    image: Image.Image, plan: ViewPlan, large: np.ndarray, small: np.ndarray
) -> None:
    """Write the crops of an RGB image as uint8 into large (L, 3, S, S) and small (P, 3, s, s)."""
    for crop, out in zip(plan.crops, (*large, *small), strict=True):
        out[:] = np.asarray(render_crop_pil(image, crop)).transpose(2, 0, 1)


def render_crop_pil(image: Image.Image, crop: CropPlan) -> Image.Image:
    """Return one crop (size x size, RGB).

    Erasing is left to the device, which draws the noise.
    """
    return _strong(image, crop) if crop.strong else _weak(image, crop)


def crop_and_resize(image: Image.Image, crop: CropPlan) -> Image.Image:
    """Cut out the box and resize it with antialiasing, as torchvision does."""
    left, top, width, height = crop.box
    cut = image.crop((left, top, left + width, top + height))
    resample = Image.Resampling.BILINEAR if crop.bilinear else Image.Resampling.BICUBIC
    return resize_pil(cut, crop.size, crop.size, resample=resample)


def resize_pil(
    image: Image.Image,
    width: int,
    height: int,
    *,
    resample: Image.Resampling = Image.Resampling.BICUBIC,
) -> Image.Image:
    """Resize with antialiasing, horizontally first."""
    # Two calls fix the order of the passes: a single call of Pillow 13 or later may begin with the
    # vertical one, which rounds differently in between.
    return image.resize((width, image.height), resample).resize((width, height), resample)


def _strong(image: Image.Image, crop: CropPlan) -> Image.Image:
    # The released order: RandAugment sees the whole image, and the crop comes after it. In timm and
    # DeiT the crop comes first.
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
    # torchvision multiplies the share of a full turn by 255, not 256. Bytes wrap around as hues do.
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
    """Apply one RandAugment operation to a whole image."""
    value = operation.value
    match operation.name:
        case "color" | "contrast" | "brightness" | "sharpness":
            return ENHANCE[operation.name](image).enhance(value)
        case "auto_contrast":
            return ImageOps.autocontrast(image)
        case "equalize":
            return ImageOps.equalize(image)
        case "invert":
            return ImageOps.invert(image)
        case "posterize":
            # Not ImageOps.posterize: from Pillow 13 on it refuses 0 bits, which magnitude 10 asks
            # for and which give a black image in the released code.
            mask = (0xFF << (8 - int(value))) & 0xFF
            return image.point([level & mask for level in range(256)] * 3)
        case "solarize":
            return ImageOps.solarize(image, int(value))
        case "solarize_add":
            table = [min(255, level + int(value)) if level < 128 else level for level in range(256)]
            return image.point(table * 3)
        case _:
            return _geometric(image, operation)


def _geometric(image: Image.Image, operation: Operation) -> Image.Image:
    resample = Image.Resampling.BICUBIC if operation.bicubic else Image.Resampling.BILINEAR
    if operation.name == "rotate":
        return image.rotate(operation.value, resample=resample, fillcolor=FILL)
    value = operation.value
    width, height = image.size
    # Spelled out a second time and not taken from the compiled renderer, which is tested against
    # this.
    matrices = {
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
