"""Transforms that move pixels both ways (rotations), column by column, with Pillow's arithmetic in double precision.

A column of the output is a straight line in the source: where its pixels lie, which source pixels are around each, and
what lies between those. Each step runs along the column, so that all but the second are vectorised.
"""

import math

import numpy as np

from mugs.data.views.render.compiled import cached_njit


@cached_njit
def warp_affine(
    planes: np.ndarray,
    start: np.ndarray,
    size: np.ndarray,
    matrix: np.ndarray,
    bicubic: bool,
    out_start: np.ndarray,
    fill: np.ndarray,
    out: np.ndarray,
) -> None:
    """Planes from `start` on of an image of a given size -> out (3, w, h), from `out_start` on.

    Outside the image is `fill`, and pixels beyond its edge repeat it.
    """
    pixels, num = pack_rgb(planes), out.shape[2]
    places, around, rows = np.empty((2, num)), np.empty((4, 4, num), np.uint32), np.empty((4, num))
    for i in range(out.shape[1]):
        trace_column(matrix, out_start[0] + i, out_start[1], places[0], places[1])
        low, high = find_inside_range(places[0], places[1], size)
        x, y = places[0, low:high], places[1, low:high]
        gather_neighbors(pixels, start, size, bicubic, x, y, around)
        for channel in range(3):
            line, shift = out[channel, i], np.uint32(8 * channel)
            line[:low], line[high:] = fill[channel], fill[channel]
            if bicubic:
                interpolate_bicubic(around, x, y, shift, rows, line[low:high])
            else:
                interpolate_bilinear(
                    around[1, 1],
                    around[1, 2],
                    around[2, 1],
                    around[2, 2],
                    x,
                    y,
                    shift,
                    line[low:high],
                )


@cached_njit
def pack_rgb(planes: np.ndarray) -> np.ndarray:
    """Planes (3, w, h) -> a word a pixel (w, h), the first channel in the lowest byte."""
    _, width, height = planes.shape
    out = np.empty((width, height), np.uint32)
    for x in range(width):
        red, green, blue, line = planes[0, x], planes[1, x], planes[2, x], out[x]
        for y in range(height):
            line[y] = (
                np.uint32(red[y])
                | (np.uint32(green[y]) << np.uint32(8))
                | (np.uint32(blue[y]) << np.uint32(16))
            )
    return out


@cached_njit
def trace_column(matrix: np.ndarray, column: int, top: int, x: np.ndarray, y: np.ndarray) -> None:
    """Where in the source the pixels of a column lie, from the one at `top` on."""
    out_x = column + 0.5
    for j in range(len(x)):
        out_y = top + j + 0.5
        x[j] = matrix[0] * out_x + matrix[1] * out_y + matrix[2]
        y[j] = matrix[3] * out_x + matrix[4] * out_y + matrix[5]


@cached_njit
def find_inside_range(x: np.ndarray, y: np.ndarray, size: np.ndarray) -> tuple[int, int]:
    """Places low ... high - 1 are in the image, which a straight line enters and leaves once."""
    low, high = 0, len(x)
    while low < high and not (0 <= x[low] < size[0] and 0 <= y[low] < size[1]):
        low += 1
    while low < high and not (0 <= x[high - 1] < size[0] and 0 <= y[high - 1] < size[1]):
        high -= 1
    return low, high


@cached_njit
def gather_neighbors(
    pixels: np.ndarray,
    start: np.ndarray,
    size: np.ndarray,
    bicubic: bool,
    x: np.ndarray,
    y: np.ndarray,
    out: np.ndarray,
) -> None:
    """Of the 4 x 4 pixels around each place at least those needed -> out (row, column, place).

    In x and y remains how far beyond pixel (1, 1) the place lies, as a share of a pixel.
    """
    for k in range(len(x)):
        j = np.uint64(k)
        left, top = math.floor(x[j] - 0.5), math.floor(y[j] - 0.5)
        x[j], y[j] = x[j] - 0.5 - left, y[j] - 0.5 - top
        if left >= 1 and left + 2 < size[0] and top >= 1 and top + 2 < size[1]:
            column, row = left - 1 - start[0], top - 1 - start[1]
            if bicubic:
                for a in range(4):
                    for b in range(4):
                        out[b, a, j] = pixels[np.uint64(column + a), np.uint64(row + b)]
            else:
                for a in range(1, 3):
                    for b in range(1, 3):
                        out[b, a, j] = pixels[np.uint64(column + a), np.uint64(row + b)]
        else:
            for a in range(4):
                column = min(max(left + a - 1, 0), size[0] - 1) - start[0]
                for b in range(4):
                    out[b, a, j] = pixels[column, min(max(top + b - 1, 0), size[1] - 1) - start[1]]


@cached_njit
def interpolate_bilinear(
    a: np.ndarray,
    b: np.ndarray,
    c: np.ndarray,
    d: np.ndarray,
    dx: np.ndarray,
    dy: np.ndarray,
    shift: int,
    line: np.ndarray,
) -> None:
    """Bilinear: a and b in the upper row, c and d in the lower one."""
    for j in range(len(line)):
        upper, lower = unpack_channel(a[j], shift), unpack_channel(c[j], shift)
        upper += (unpack_channel(b[j], shift) - upper) * dx[j]
        lower += (unpack_channel(d[j], shift) - lower) * dx[j]
        line[j] = np.int32(upper + (lower - upper) * dy[j])


@cached_njit
def interpolate_bicubic(
    around: np.ndarray,
    dx: np.ndarray,
    dy: np.ndarray,
    shift: int,
    rows: np.ndarray,
    line: np.ndarray,
) -> None:
    """Bicubic: within the four rows, then between them."""
    for row in range(4):
        a, b, c, d, out = around[row, 0], around[row, 1], around[row, 2], around[row, 3], rows[row]
        for j in range(len(line)):
            out[j] = keys_cubic_one(
                unpack_channel(a[j], shift),
                unpack_channel(b[j], shift),
                unpack_channel(c[j], shift),
                unpack_channel(d[j], shift),
                dx[j],
            )
    first, second, third, fourth = rows[0], rows[1], rows[2], rows[3]
    for j in range(len(line)):
        value = np.int32(keys_cubic_one(first[j], second[j], third[j], fourth[j], dy[j]))
        line[j] = min(max(value, np.int32(0)), np.int32(255))


@cached_njit
def unpack_channel(word: int, shift: int) -> float:
    """One channel of a packed pixel."""
    return float(np.int32((word >> shift) & np.uint32(255)))


@cached_njit
def keys_cubic_one(a: float, b: float, c: float, d: float, share: float) -> float:
    """Keys' kernel with a = -1, which Pillow's transforms use (its resize has -0.5)."""
    return b + share * (c - a + share * (2 * (a - b) + c - d + share * (b - a - c + d)))
