"""Affine transforms of planes (3, W, H) as Pillow's `Image.transform`, of a part of the image."""

import math
from collections.abc import Sequence

import numpy as np

from mugs.data.plan import Operation
from mugs.data.render.compiled import compiled

FILL = (124, 116, 104)
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


def transform(
    planes: np.ndarray, inside: Region, size: tuple[int, int], matrix: tuple[float, ...], bicubic: bool, region: Region
) -> np.ndarray:
    """Planes (3, w, h) of `region` of the transformed image; `planes` hold the part `inside` of one of a given size."""
    out = np.empty((3, region[2], region[3]), np.uint8)
    fill = np.array(FILL, np.uint8)
    warp(planes, inside[0], inside[1], size[0], size[1], np.array(matrix), bicubic, region[0], region[1], fill, out)
    return out


@compiled
def warp(
    planes: np.ndarray,
    left: int,
    top: int,
    width: int,
    height: int,
    matrix: np.ndarray,
    bicubic: bool,
    out_left: int,
    out_top: int,
    fill: np.ndarray,
    out: np.ndarray,
) -> None:
    """Pixel by pixel; outside the image is `fill`, and pixels beyond its edge repeat it."""
    columns, rows = np.empty(4, np.int64), np.empty(4, np.int64)
    for i in range(out.shape[1]):
        for j in range(out.shape[2]):
            x = matrix[0] * (out_left + i + 0.5) + matrix[1] * (out_top + j + 0.5) + matrix[2]
            y = matrix[3] * (out_left + i + 0.5) + matrix[4] * (out_top + j + 0.5) + matrix[5]
            if x < 0 or x >= width or y < 0 or y >= height:
                for channel in range(3):
                    out[channel, i, j] = fill[channel]
                continue
            x0, y0 = math.floor(x - 0.5), math.floor(y - 0.5)
            dx, dy = x - 0.5 - x0, y - 0.5 - y0
            for tap in range(4):
                columns[tap] = min(max(x0 + tap - 1, 0), width - 1) - left
                rows[tap] = min(max(y0 + tap - 1, 0), height - 1) - top
            for channel in range(3):
                plane = planes[channel]
                if bicubic:
                    a = cubic_between(plane, columns, rows[0], dx)
                    b = cubic_between(plane, columns, rows[1], dx)
                    c = cubic_between(plane, columns, rows[2], dx)
                    d = cubic_between(plane, columns, rows[3], dx)
                    value = cubic(a, b, c, d, dy)
                else:
                    upper = linear(plane[columns[1], rows[1]], plane[columns[2], rows[1]], dx)
                    lower = linear(plane[columns[1], rows[2]], plane[columns[2], rows[2]], dx)
                    value = upper + (lower - upper) * dy
                out[channel, i, j] = np.uint8(min(max(value, 0.0), 255.0))


@compiled
def linear(a: int, b: int, share: float) -> float:
    """Between two neighbours."""
    return float(a) + (float(b) - float(a)) * share


@compiled
def cubic_between(plane: np.ndarray, columns: np.ndarray, row: int, share: float) -> float:
    """Between the middle two of four pixels of a row."""
    a, b = float(plane[columns[0], row]), float(plane[columns[1], row])
    c, d = float(plane[columns[2], row]), float(plane[columns[3], row])
    value: float = cubic(a, b, c, d, share)
    return value


@compiled
def cubic(a: float, b: float, c: float, d: float, share: float) -> float:
    """Keys' kernel with a = -1, which Pillow's transforms use (its resize has -0.5)."""
    return b + share * (c - a + share * (2 * (a - b) + c - d + share * (b - a - c + d)))
