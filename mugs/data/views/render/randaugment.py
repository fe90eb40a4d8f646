"""RandAugment on whole images, computed only where a crop needs it.

In the released order, operations see the whole image and the crop comes last. A plan is drawn
before a pixel is touched, so the pixels that a crop needs can be followed backwards through the
operations. Only these are computed. Statistics (histogram, mean gray) are still those of the whole
image.
"""

from dataclasses import dataclass
from functools import cached_property

import numpy as np

from mugs.data.views.plan import Operation
from mugs.data.views.render import geometry
from mugs.data.views.render.compiled import cached_njit
from mugs.data.views.render.geometry import Region
from mugs.data.views.render.photometric import (
    LEVELS,
    adjust_saturation,
    apply_table,
    blend_table,
    mean_luma,
    truncate_to_byte,
)

IDENTITY = np.tile(LEVELS.astype(np.uint8), (3, 1))
GEOMETRIC = ("rotate", "shear_x", "shear_y", "translate_x", "translate_y")
# Operations that depend on all pixels of their input.
STATISTICAL = ("auto_contrast", "equalize", "contrast")


@dataclass
class LeveledImage:
    """An image (3, W, H) and the table (3, 256) that its levels are to be replaced by.

    The statistics are those after the replacement, found without touching the pixels where
    possible.
    """

    planes: np.ndarray
    table: np.ndarray

    @cached_property
    def histogram(self) -> np.ndarray:
        """Counts of levels (3, 256)."""
        counts = np.zeros((3, 256), np.int64)
        count_levels(self.planes, counts)
        # Push the counts through the table: new level t[l] gets the count of every level l.
        return np.stack(
            [
                np.bincount(table, count, 256)
                for table, count in zip(self.table, counts, strict=True)
            ]
        ).astype(np.int64)

    @cached_property
    def mean_luma(self) -> int:
        """Mean gray level, rounded."""
        planes = self.planes
        if self.table is not IDENTITY:
            planes = planes.copy()
            apply_table(planes, self.table)
        return int(mean_luma(planes))


@cached_njit
def count_levels(planes: np.ndarray, counts: np.ndarray) -> None:
    """Add the number of pixels of each level to counts (3, 256)."""
    for channel in range(3):
        pixels = planes[channel].reshape(-1)
        count = counts[channel]
        for i in range(len(pixels)):
            count[pixels[i]] += 1


def augment_region(
    whole: LeveledImage, mirror: bool, operations: tuple[Operation, ...], box: Region
) -> np.ndarray:
    """Return planes (3, w, h) of a box of the image after mirroring and the operations."""
    size = (whole.planes.shape[1], whole.planes.shape[2])
    # regions[i] is what operation i has to see; the last one is the box itself.
    regions = [box]
    for operation in reversed(operations):
        regions.insert(0, required_region(operation, regions[0], size))
    # Statistics of the result of tables follow from the histogram. After any other operation they
    # need all pixels, so what comes before is applied to the whole image.
    for index, operation in enumerate(operations):
        if operation.name in STATISTICAL and not all(map(maps_levels, operations[:index])):
            regions[: index + 1] = [(0, 0, *size)] * (index + 1)
    left, top, wide, high = regions[0]
    start = size[0] - left - wide if mirror else left
    part = whole.planes[:, start : start + wide, top : top + high]
    pixels = np.array(part[:, ::-1] if mirror else part, order="C")
    for operation, inside, outside in zip(operations, regions[:-1], regions[1:], strict=True):
        if maps_levels(operation):
            table = level_table(operation, whole)
            pixels = crop_region(pixels, inside, outside)
            if pixels is whole.planes:
                # Its levels are counted as they were before the table.
                pixels = pixels.copy()
            apply_table(pixels, table)
            # Both tables in one: what the levels of the planes become after this operation, too.
            both = np.take_along_axis(table, whole.table.astype(np.intp), axis=1)
            whole = LeveledImage(whole.planes, both)
        else:
            pixels = apply_spatial_operation(operation, pixels, inside, outside, size)
            whole = LeveledImage(pixels, IDENTITY)
    return pixels


def maps_levels(operation: Operation) -> bool:
    """Return whether an operation only replaces levels, channel by channel."""
    return operation.name not in (*GEOMETRIC, "color", "sharpness")


def required_region(operation: Operation, region: Region, size: tuple[int, int]) -> Region:
    """Return what an operation has to see to give the pixels of a region."""
    if operation.name in GEOMETRIC:
        return geometry.source_region(geometry.affine_matrix(operation, *size), region, *size)
    if operation.name == "sharpness":
        # Its 3 x 3 filter reaches one pixel further on every side.
        left = max(region[0] - 1, 0)
        top = max(region[1] - 1, 0)
        right = min(region[0] + region[2] + 1, size[0])
        bottom = min(region[1] + region[3] + 1, size[1])
        return left, top, right - left, bottom - top
    return region


def crop_region(pixels: np.ndarray, inside: Region, outside: Region) -> np.ndarray:
    """Return the pixels of region `outside` out of those of region `inside`."""
    if inside == outside:
        return pixels
    left = outside[0] - inside[0]
    top = outside[1] - inside[1]
    return np.ascontiguousarray(pixels[:, left : left + outside[2], top : top + outside[3]])


def apply_spatial_operation(
    operation: Operation, pixels: np.ndarray, inside: Region, outside: Region, size: tuple[int, int]
) -> np.ndarray:
    """Turn the pixels of region `inside` into those of region `outside`.

    The operation is a geometric one, "color", which mixes channels, or "sharpness", which mixes
    pixels.
    """
    if operation.name in GEOMETRIC:
        matrix = geometry.affine_matrix(operation, *size)
        return geometry.transform_region(pixels, inside, size, matrix, operation.bicubic, outside)
    if operation.name == "color":
        pixels = crop_region(pixels, inside, outside)
        adjust_saturation(pixels, operation.value)
        return pixels
    out = np.empty((3, outside[2], outside[3]), np.uint8)
    sharpen_region(pixels, outside[0] - inside[0], outside[1] - inside[1], operation.value, out)
    return out


@cached_njit
def sharpen_region(pixels: np.ndarray, left: int, top: int, factor: float, out: np.ndarray) -> None:
    """Blend pixels from (left, top) on with the smoothed image; factor 0 gives the smoothed image.

    The outermost pixels of `pixels` are kept as they are. They are the border of the image, which
    Pillow's filter leaves alone, or lie outside the region that is asked for.
    """
    _, width, height = pixels.shape
    num = out.shape[2]
    low = max(1 - top, 0)
    high = min(height - 1 - top, num)
    for channel in range(3):
        for i in range(out.shape[1]):
            x = left + i
            line = out[channel, i]
            line[:] = pixels[channel, x, top : top + num]
            if 0 < x < width - 1 and low < high:
                rows = pixels[channel, x - 1 : x + 2, top + low - 1 : top + high + 1]
                sharpen_line(rows[0], rows[1], rows[2], np.float32(factor), line[low:high])


@cached_njit
def sharpen_line(
    before: np.ndarray, here: np.ndarray, after: np.ndarray, alpha: float, line: np.ndarray
) -> None:
    """Blend a line with its smoothed pixels: Pillow's SMOOTH filter and `Image.blend`.

    The filter has the weight 5 / 13 at the pixel and 1 / 13 at each of its eight neighbors. The
    three lines given are one pixel longer than `line` at both ends.
    """
    for k in range(len(line)):
        total = np.int32(before[k]) + np.int32(before[k + 1]) + np.int32(before[k + 2])
        total += np.int32(here[k]) + 5 * np.int32(here[k + 1]) + np.int32(here[k + 2])
        total += np.int32(after[k]) + np.int32(after[k + 1]) + np.int32(after[k + 2])
        # The smoothed image is one of bytes in Pillow, so it is rounded before it is blended.
        smooth = np.float32(
            np.int32(np.float32(np.int32(total)) * np.float32(1 / 13) + np.float32(0.5))
        )
        line[k] = truncate_to_byte(smooth + alpha * (np.float32(here[k + 1]) - smooth))


def level_table(operation: Operation, whole: LeveledImage) -> np.ndarray:
    """Return the new levels (3, 256) of an operation that replaces levels."""
    value = operation.value
    match operation.name:
        case "auto_contrast":
            return np.stack([autocontrast_table(counts) for counts in whole.histogram])
        case "equalize":
            return np.stack([equalize_table(counts) for counts in whole.histogram])
        case "contrast":
            table = blend_table(whole.mean_luma, value)
        case "brightness":
            table = blend_table(0, value)
        case "invert":
            table = 255 - LEVELS
        case "posterize":
            # Keep the upper `value` bits; no bits give a black image.
            table = LEVELS & (0xFF << (8 - int(value)) & 0xFF)
        case "solarize":
            table = np.where(int(value) <= LEVELS, 255 - LEVELS, LEVELS)
        case _:
            # "solarize_add" brightens the dark half.
            table = np.where(LEVELS < 128, np.minimum(LEVELS + int(value), 255), LEVELS)
    return np.tile(table.astype(np.uint8), (3, 1))


def autocontrast_table(counts: np.ndarray) -> np.ndarray:
    """Return the levels that spread those in use over 0 to 255, as `ImageOps.autocontrast`."""
    used = np.flatnonzero(counts)
    low = int(used[0])
    high = int(used[-1])
    if high <= low:
        return LEVELS.astype(np.uint8)
    scale = 255.0 / (high - low)
    return np.clip((LEVELS * scale - low * scale).astype(np.int64), 0, 255).astype(np.uint8)


def equalize_table(counts: np.ndarray) -> np.ndarray:
    """Return the levels that equalize a histogram, in the integer steps of `ImageOps.equalize`."""
    used = counts[counts > 0]
    step = (used.sum() - used[-1]) // 255
    if len(used) <= 1 or step == 0:
        return LEVELS.astype(np.uint8)
    before = np.concatenate([[0], np.cumsum(counts)[:-1]])
    return np.asarray(np.clip((step // 2 + before) // step, 0, 255), np.uint8)
