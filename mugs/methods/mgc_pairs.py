"""Which cells of two overlapping crops show the same piece of an image, for MGC.

Both crops are divided into G x G cells of equal size. Cells of the first crop are scanned with a
stride that grows with the overlap of the crops; each is paired with every cell of the second crop
that shows a part of it. The pairs that share most are kept.

Everything is exact: with G times a pixel as the unit of length, all borders of cells are integers.

Shapes: N images, G cells on a side, R and C scanned rows and columns of the first crop, M pairs.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor


@dataclass(frozen=True)
class StrideRule:
    """Stride of a scan: the overlap (IoU) of the crops times `factor`, rounded down and clamped."""

    factor: int
    least: int
    most: int

    def strides(self, shared: Tensor, united: Tensor) -> Tensor:
        """Return the strides (N,) of images whose crops have these areas in common and in all."""
        return (self.factor * shared // united).clamp(self.least, self.most)


@dataclass(frozen=True)
class PairRule:
    """Pairs of one level: cells on a side, pairs of an image, strides in rows and columns."""

    grid: int
    num_pairs: int
    rows: StrideRule
    columns: StrideRule


@dataclass(frozen=True)
class Pairs:
    """Cells (2, N, M) of the first and second crop, and the share (N, M) of both that they share.

    Cells are counted row by row, in the crop as the network sees it, that is after the flip. The
    share is the common area over the sum of the areas of both cells. Where an image has fewer pairs
    than M, the rest are cells 0 and 0 with share 0.
    """

    cells: Tensor
    shares: Tensor


@torch.no_grad()
def find_pairs(boxes: Tensor, flips: Tensor, rule: PairRule) -> Pairs:
    """Find the pairs of cells of one level.

    Args:
        boxes: (N, 2, 4), integers: left, top, width and height of both crops, in pixels.
        flips: (N, 2), whether a crop is flipped.
        rule: cells, pairs and strides of the level.
    """
    boxes = boxes.long()
    grid = rule.grid
    # Lengths from here on are in units of a pixel / G, so a cell is as long as its crop is wide.
    corner, size = boxes[..., :2] * grid, boxes[..., 2:]
    low = corner.amax(dim=1)
    high = (corner + size * grid).amin(dim=1)
    # Areas in units of a cell, times G^2.
    shared = (high - low).clamp(min=0).prod(dim=-1)
    areas = size.prod(dim=-1).sum(dim=-1)
    united = areas * grid**2 - shared

    columns, width_NCG = _scan_axis(corner, size, low, high, 0, rule.columns, shared, united, grid)
    rows, height_NRG = _scan_axis(corner, size, low, high, 1, rule.rows, shared, united, grid)

    # Overlap of rectangles is separable. Candidates are in scan order: cells of the first crop row
    # by row, for each those of the second crop row by row.
    overlap = height_NRG[:, :, None, :, None] * width_NCG[:, None, :, None, :]
    first = (rows[:, :, None] * grid + _unflip(columns, flips[:, :1], grid)[:, None])[..., None]
    second_column = _unflip(torch.arange(grid, device=boxes.device)[None], flips[:, 1:], grid)
    second = torch.arange(grid, device=boxes.device)[:, None] * grid + second_column[:, None]
    overlap = overlap.flatten(1, 2).flatten(2)  # (N, R C, G G)
    first = first.flatten(1, 2).expand_as(overlap).flatten(1)
    second = second.flatten(1)[:, None].expand_as(overlap).flatten(1)

    order, kept = _choose_candidates(overlap.flatten(1), rule.num_pairs)
    cells = torch.stack([first.gather(1, order), second.gather(1, order)])
    return Pairs(
        torch.where(kept > 0, cells, 0), (kept.double() / areas[:, None].clamp(min=1)).float()
    )


def _scan_axis(
    corner: Tensor,
    size: Tensor,
    low: Tensor,
    high: Tensor,
    axis: int,
    rule: StrideRule,
    shared: Tensor,
    united: Tensor,
    grid: int,
) -> tuple[Tensor, Tensor]:
    """Return the scanned cells (N, R) of the first crop along an axis, and overlaps (N, R, G).

    An overlap is the length that a scanned cell, cut to what both crops show, has in common with a
    cell of the second crop. It is 0 for a cell that is not in the crop.
    """
    index = torch.arange(grid, device=corner.device)
    starts = corner[..., axis, None] + size[..., axis, None] * index  # (N, 2, G)
    ends = starts + size[..., axis, None]
    low, high = low[:, axis, None], high[:, axis, None]

    begins = starts[:, 0].maximum(low)
    finishes = ends[:, 0].minimum(high)
    # The scan starts at the first cell that shows what both crops show.
    touched = finishes > begins
    first = touched.int().argmax(dim=1)
    steps = torch.arange(-(-grid // rule.least), device=corner.device)
    scanned = first[:, None] + rule.strides(shared, united)[:, None] * steps
    inside = scanned < grid
    scanned = scanned.clamp(max=grid - 1)

    length = finishes.gather(1, scanned)[..., None].minimum(ends[:, 1, None])
    length = length - begins.gather(1, scanned)[..., None].maximum(starts[:, 1, None])
    return scanned, torch.where(inside[..., None], length.clamp(min=0), 0)


def _unflip(columns: Tensor, flipped: Tensor, grid: int) -> Tensor:
    """Return where columns of the image are in the crop as the network sees it."""
    return torch.where(flipped, grid - 1 - columns, columns)


def _choose_candidates(overlap: Tensor, num_pairs: int) -> tuple[Tensor, Tensor]:
    """Return indices (N, M) of the candidates that are kept, and their overlaps, 0 for none.

    Of more than M candidates, those with the largest overlap are kept, smallest first; otherwise
    they stay in scan order (released).
    """
    overlap = F.pad(overlap, (0, max(0, num_pairs - overlap.shape[1])))
    count = overlap.shape[1]
    index = torch.arange(count, device=overlap.device)
    # One key for overlap and index, so that equal overlaps are in the same order on every device.
    # Of these the last in scan order are kept.
    key = (overlap * count + index).topk(num_pairs, dim=1).values.flip(1)
    chosen, kept = key % count, key // count
    few = (overlap > 0).sum(dim=1, keepdim=True) <= num_pairs
    in_scan_order = torch.where(kept > 0, chosen, count)
    by_overlap = torch.arange(num_pairs, device=overlap.device)
    order = torch.where(few, in_scan_order, by_overlap).argsort(dim=1, stable=True)
    chosen, kept = chosen.gather(1, order), kept.gather(1, order)
    # The zeros that `pad` appended are no candidates.
    return torch.where(kept > 0, chosen, 0), kept
