"""Affine transforms of planes (3, W, H) as Pillow's `Image.transform`, of a part of the image."""

import math
from collections.abc import Sequence

import numpy as np

from mugs.data.views.plan import Operation
from mugs.data.views.render.compiled import cached_njit
from mugs.data.views.render.warp import keys_cubic_one, warp_affine

FILL = np.array([124, 116, 104], np.uint8)
Region = tuple[int, int, int, int]  # left, top, width, height


def affine_matrix(operation: Operation, width: int, height: int) -> tuple[float, ...]:
    """The six coefficients that give the source of an output pixel, for an image of the given size."""
    value = operation.value
    if operation.name == "rotate":
        angle = -math.radians(value % 360)
        cos, sin = round(math.cos(angle), 15), round(math.sin(angle), 15)
        x, y = width / 2, height / 2
        return (cos, sin, cos * -x + sin * -y + x, -sin, cos, -sin * -x + cos * -y + y)
    matrices = {
        "shear_x": (1.0, value, 0.0, 0.0, 1.0, 0.0),
        "shear_y": (1.0, 0.0, 0.0, value, 1.0, 0.0),
        "translate_x": (1.0, 0.0, value * width, 0.0, 1.0, 0.0),
        "translate_y": (1.0, 0.0, 0.0, 0.0, 1.0, value * height),
    }
    return matrices[operation.name]


def source_region(matrix: Sequence[float], region: Region, width: int, height: int) -> Region:
    """What of the source the pixels of a region are interpolated from, at least one pixel of it."""
    left, top, wide, high = region
    a, b, c, d, e, f = matrix
    corners = [(x + 0.5, y + 0.5) for x in (left, left + wide - 1) for y in (top, top + high - 1)]
    xs, ys = [a * x + b * y + c for x, y in corners], [d * x + e * y + f for x, y in corners]

    def span(values: list[float], length: int) -> tuple[int, int]:
        low = min(max(math.floor(min(values)) - 3, 0), length - 1)
        return low, max(min(math.floor(max(values)) + 4, length), low + 1)

    (x0, x1), (y0, y1) = span(xs, width), span(ys, height)
    return x0, y0, x1 - x0, y1 - y0


def transform_region(
    planes: np.ndarray,
    inside: Region,
    size: tuple[int, int],
    matrix: tuple[float, ...],
    bicubic: bool,
    region: Region,
) -> np.ndarray:
    """Planes (3, w, h) of `region` of the transformed image; `planes` hold the part `inside` of one of a given size."""
    a, b, c, d, e, f = matrix
    start, out_start = np.array(inside[:2]), np.array(region[:2])
    if (a, b, c, e) == (1, 0, 0, 1):  # columns move along themselves
        out = np.empty((3, region[2], region[3]), np.uint8)
        shift_columns(planes, start, size[1], d, f, bicubic, out_start, FILL, out)
        return out
    if (a, d, e, f) == (1, 0, 1, 0):  # rows do
        out, turned = (
            np.empty((3, region[3], region[2]), np.uint8),
            np.ascontiguousarray(planes.transpose(0, 2, 1)),
        )
        shift_columns(
            turned, start[::-1].copy(), size[0], b, c, bicubic, out_start[::-1].copy(), FILL, out
        )
        return np.ascontiguousarray(out.transpose(0, 2, 1))
    out = np.empty((3, region[2], region[3]), np.uint8)
    warp_affine(planes, start, np.array(size), np.array(matrix), bicubic, out_start, FILL, out)
    return out


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
    """Column x of the image moves up by slope * (x + 0.5) + offset."""
    num = out.shape[2]
    for i in range(out.shape[1]):
        x = out_start[0] + i
        move = slope * (x + 0.5) + offset
        whole = math.floor(move)
        share, first = move - whole, out_start[1] + whole
        low, high = min(max(1 - first, 0), num), min(max(height - 2 - first, 0), num)
        for channel in range(3):
            column, target = planes[channel, x - start[0]], out[channel, i]
            for j in range(0, low):
                target[j] = sample_at_edge(
                    column, first + j, start[1], height, share, bicubic, fill[channel]
                )
            for j in range(max(low, high), num):
                target[j] = sample_at_edge(
                    column, first + j, start[1], height, share, bicubic, fill[channel]
                )
            if low < high:
                inner = column[first + low - 1 - start[1] :]
                shift_column_interior(inner, share, bicubic, target[low:high])


@cached_njit
def sample_at_edge(
    column: np.ndarray,
    position: int,
    start: int,
    height: int,
    share: float,
    bicubic: bool,
    fill: int,
) -> int:
    """Near the edge of the image: between two pixels of a column that starts at `start`."""
    if position + 0.5 + share < 0 or position + 0.5 + share >= height:
        return fill
    a, b = column[max(position - 1, 0) - start], column[max(position, 0) - start]
    c, d = (
        column[min(position + 1, height - 1) - start],
        column[min(position + 2, height - 1) - start],
    )
    value = float(b) + (float(c) - float(b)) * share
    if bicubic:
        value = keys_cubic_one(float(a), float(b), float(c), float(d), share)
    return int(min(max(value, 0.0), 255.0))


@cached_njit
def shift_column_interior(
    column: np.ndarray, share: float, bicubic: bool, target: np.ndarray
) -> None:
    """Target j lies between pixels j + 1 and j + 2 of the column."""
    if bicubic:
        for j in range(len(target)):
            a, b, c, d = (
                float(column[j]),
                float(column[j + 1]),
                float(column[j + 2]),
                float(column[j + 3]),
            )
            target[j] = np.uint8(min(max(keys_cubic_one(a, b, c, d, share), 0.0), 255.0))
    else:
        for j in range(len(target)):
            b, c = float(column[j + 1]), float(column[j + 2])
            target[j] = np.uint8(b + (c - b) * share)
