"""Affine transforms of a region of an image, equal to Pillow's `Image.transform`.

Planes are transposed, (3, W, H).
"""

import math
from collections.abc import Sequence

import numpy as np

from mugs.data.views.plan import Operation
from mugs.data.views.render.compiled import cached_njit
from mugs.data.views.render.warp import keys_cubic_one, warp_affine

# ImageNet's mean color, 255 * (0.485, 0.456, 0.406), which timm and the released code fill with.
FILL = np.array([124, 116, 104], np.uint8)
# Left, top, width and height in pixels.
Region = tuple[int, int, int, int]


def affine_matrix(operation: Operation, width: int, height: int) -> tuple[float, ...]:
    """Return the six coefficients a to f of an operation on an image of the given size.

    Output place (x, y) lies at (a x + b y + c, d x + e y + f) in the source.
    """
    value = operation.value
    if operation.name == "rotate":
        # The steps of `Image.rotate`: about the center, with its rounding of sine and cosine.
        angle = -math.radians(value % 360)
        cos = round(math.cos(angle), 15)
        sin = round(math.sin(angle), 15)
        x = width / 2
        y = height / 2
        return (cos, sin, cos * -x + sin * -y + x, -sin, cos, -sin * -x + cos * -y + y)
    matrices = {
        "shear_x": (1.0, value, 0.0, 0.0, 1.0, 0.0),
        "shear_y": (1.0, 0.0, 0.0, value, 1.0, 0.0),
        "translate_x": (1.0, 0.0, value * width, 0.0, 1.0, 0.0),
        "translate_y": (1.0, 0.0, 0.0, 0.0, 1.0, value * height),
    }
    return matrices[operation.name]


def source_region(matrix: Sequence[float], region: Region, width: int, height: int) -> Region:
    """Return the part of the source that a region is interpolated from; never an empty one."""
    left, top, wide, high = region
    a, b, c, d, e, f = matrix
    # A linear map takes its extremes at the corners.
    corners = [(x + 0.5, y + 0.5) for x in (left, left + wide - 1) for y in (top, top + high - 1)]
    x0, x1 = _padded_span([a * x + b * y + c for x, y in corners], width)
    y0, y1 = _padded_span([d * x + e * y + f for x, y in corners], height)
    return x0, y0, x1 - x0, y1 - y0


def _padded_span(places: list[float], length: int) -> tuple[int, int]:
    # Bicubic interpolation reaches two pixels to either side; one more is for rounding. A region
    # that lies outside the image still needs a pixel, as arrays here are never empty.
    low = min(max(math.floor(min(places)) - 3, 0), length - 1)
    return low, max(min(math.floor(max(places)) + 4, length), low + 1)


def transform_region(
    planes: np.ndarray,
    inside: Region,
    size: tuple[int, int],
    matrix: tuple[float, ...],
    bicubic: bool,
    region: Region,
) -> np.ndarray:
    """Return the planes (3, w, h) of a region of the transformed image.

    Args:
        planes: the part of the source that `source_region` asks for.
        inside: where that part lies in the source.
        size: width and height of the source.
        matrix: coefficients of `affine_matrix`.
        bicubic: interpolate by 16 pixels, else by 4.
        region: the region of the output.
    """
    a, b, c, d, e, f = matrix
    _, _, wide, high = region
    start = np.array(inside[:2])
    out_start = np.array(region[:2])
    if (a, d, e, f) == (1, 0, 1, 0):
        # Horizontal shear or shift: as a vertical one, by way of transposed planes.
        out = np.empty((3, high, wide), np.uint8)
        turned = np.ascontiguousarray(planes.transpose(0, 2, 1))
        start = start[::-1].copy()
        out_start = out_start[::-1].copy()
        shift_columns(turned, start, size[0], b, c, bicubic, out_start, FILL, out)
        return np.ascontiguousarray(out.transpose(0, 2, 1))
    out = np.empty((3, wide, high), np.uint8)
    if (a, b, c, e) == (1, 0, 0, 1):
        # Vertical shear or shift: columns move along themselves, which needs two or four pixels
        # each instead of four or sixteen.
        shift_columns(planes, start, size[1], d, f, bicubic, out_start, FILL, out)
    else:
        warp_affine(planes, start, np.array(size), np.array(matrix), bicubic, out_start, FILL, out)
    return out


# Of a move this close to a whole number, some pixels may round to one side of it and some to the
# other. Places are far below 2 ** 20, where doubles are 2 ** -33 apart.
NEARLY_WHOLE = 1e-6


@cached_njit
def shift_columns(
    planes: np.ndarray,
    start: np.ndarray,
    height: int,
    slope: float,
    offset: float,
    bicubic: bool,
    out_start: np.ndarray,
    fill: np.ndarray,
    out: np.ndarray,
) -> None:
    """Move each column x of the image up by slope * (x + 0.5) + offset.

    Args:
        planes: the part of the source that is needed, (3, w, h).
        start: left and top of that part in the source.
        height: height of the source.
        slope: pixels by which neighboring columns differ.
        offset: pixels that all columns move.
        bicubic: interpolate by four pixels, else by two.
        out_start: left and top of the output region.
        fill: color (3,) of places outside the source.
        out: planes of the region, (3, w, h).
    """
    num = out.shape[2]
    shares = np.empty(num)
    for i in range(out.shape[1]):
        x = out_start[0] + i
        # All pixels of a column move alike, but Pillow rounds the place of each where it lies: the
        # pixel's center comes before the offset. The last bit of a share can decide a level, as
        # results are truncated.
        move = slope * (x + 0.5)
        center = out_start[1] + 0.5
        whole = math.floor(move + offset)
        first = out_start[1] + whole
        # Pixels low to high - 1 have all four neighbors in the image. The few before and after them
        # take the slow way, so that the loop over the rest vectorizes.
        low = min(max(1 - first, 0), num)
        high = max(min(height - 2 - first, num), low)
        if not NEARLY_WHOLE < move + offset - whole < 1 - NEARLY_WHOLE:
            high = low
        for j in range(low, high):
            shares[j] = (move + (center + j) + offset) - 0.5 - (first + j)
        for channel in range(3):
            column = planes[channel, x - start[0]]
            target = out[channel, i]
            for j in range(0, low):
                place = move + (center + j) + offset
                target[j] = sample_at(column, place, start[1], height, bicubic, fill[channel])
            for j in range(high, num):
                place = move + (center + j) + offset
                target[j] = sample_at(column, place, start[1], height, bicubic, fill[channel])
            if low < high:
                inner = column[first + low - 1 - start[1] :]
                shift_column_interior(inner, shares[low:high], bicubic, target[low:high])


@cached_njit
def sample_at(
    column: np.ndarray, place: float, start: int, height: int, bicubic: bool, fill: int
) -> int:
    """Return the value at a place, which may be near an edge; the center of pixel 0 is at 0.5.

    `column` starts at pixel `start`. Neighbors outside the image repeat its edge; a place outside
    gets `fill`.
    """
    if place < 0 or place >= height:
        return fill
    position = math.floor(place - 0.5)
    share = place - 0.5 - position
    a = column[max(position - 1, 0) - start]
    b = column[max(position, 0) - start]
    c = column[min(position + 1, height - 1) - start]
    d = column[min(position + 2, height - 1) - start]
    value = float(b) + (float(c) - float(b)) * share
    if bicubic:
        value = keys_cubic_one(float(a), float(b), float(c), float(d), share)
    return int(min(max(value, 0.0), 255.0))


@cached_njit
def shift_column_interior(
    column: np.ndarray, shares: np.ndarray, bicubic: bool, target: np.ndarray
) -> None:
    """Write into target j the value shares[j] of the way from column pixel j + 1 to j + 2."""
    if bicubic:
        for j in range(len(target)):
            a = float(column[j])
            b = float(column[j + 1])
            c = float(column[j + 2])
            d = float(column[j + 3])
            target[j] = np.uint8(min(max(keys_cubic_one(a, b, c, d, shares[j]), 0.0), 255.0))
    else:
        for j in range(len(target)):
            b = float(column[j + 1])
            c = float(column[j + 2])
            target[j] = np.uint8(b + (c - b) * shares[j])
