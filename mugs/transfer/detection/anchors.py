"""Anchors of the region proposal network (RPN)."""

import torch
from torch import Tensor

# Sizes of mmdet's Cascade R-CNN config: an anchor's side is 8 strides of its level.
ANCHOR_SCALE = 8
ANCHOR_RATIOS = (0.5, 1.0, 2.0)  # height over width


def build_level_anchors(rows: int, columns: int, stride: int, device: torch.device) -> Tensor:
    """Return the anchors (rows * columns * 3, 4) of a map, in the order of its cells, ratios last.

    Differs from torchvision's `AnchorGenerator`, which rounds the anchors and takes image size over
    map size as the stride. The two strides differ where a side is no multiple of the largest one:
    for an 800 x 1008 image, anchors of the last level would be off by up to 36 pixels.
    """
    # All ratios have the same area: width * height = (scale * stride)^2.
    root = torch.tensor(ANCHOR_RATIOS, device=device).sqrt()
    half = ANCHOR_SCALE * stride / 2 * torch.stack([1 / root, root], dim=-1)
    base = torch.cat([-half, half], dim=-1)

    # Centers are the top left corners of the cells, as in mmdet, not the centers of the cells.
    y, x = (torch.arange(n, device=device) * stride for n in (rows, columns))
    corner = torch.stack(torch.meshgrid(x, y, indexing="xy"), dim=-1).view(-1, 1, 2)
    return (torch.cat([corner, corner], dim=-1) + base).view(-1, 4)


def inside_image(anchors: Tensor, size: tuple[int, int]) -> Tensor:
    """Tell which anchors (n, 4) lie within an image of height and width `size`, without padding."""
    height, width = size
    return (anchors[:, :2] >= 0).all(dim=1) & (anchors[:, 2] < width) & (anchors[:, 3] < height)
