"""Anchors of the region proposal network."""

import torch
from torch import Tensor

ANCHOR_SCALE = 8


ANCHOR_RATIOS = (0.5, 1.0, 2.0)  # height over width


def build_level_anchors(rows: int, columns: int, stride: int, device: torch.device) -> Tensor:
    """(rows * columns * 3, 4) in the order of a map's cells, ratios last. The stride is that of the level, not
    image size over map size: the two differ where a side is no multiple of the largest stride."""
    root = torch.tensor(ANCHOR_RATIOS, device=device).sqrt()
    half = ANCHOR_SCALE * stride / 2 * torch.stack([1 / root, root], dim=-1)
    base = torch.cat([-half, half], dim=-1)
    y, x = (torch.arange(n, device=device) * stride for n in (rows, columns))
    corner = torch.stack(torch.meshgrid(x, y, indexing="xy"), dim=-1).view(-1, 1, 2)
    return (torch.cat([corner, corner], dim=-1) + base).view(-1, 4)


def inside_image(anchors: Tensor, size: tuple[int, int]) -> Tensor:
    """Whether each anchor (n, 4) lies within an image of height and width `size`, padding excluded."""
    height, width = size
    fits = [anchors[:, 0] >= 0, anchors[:, 1] >= 0, anchors[:, 2] < width, anchors[:, 3] < height]
    return torch.stack(fits).all(dim=0)
