"""Pictures of what the class token attends to in the last block (the paper's Figures 4 and 6).

Shapes: H x W pixels, h x w patches. No code of these figures is released; the callers' 480 pixels
and 60% of the attention are the settings of DINO's visualization tool.
"""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from mugs import distributed
from mugs.data.dense.pictures import (
    label_colors,
    one_below_the_other,
    overlay_labels,
    save_png,
    side_by_side,
)
from mugs.data.loading.evaluation import iter_eval_batches
from mugs.data.sources.base import Source
from mugs.data.views.config import IMAGENET_MEAN, IMAGENET_STD
from mugs.engine.progress import Progress
from mugs.models.vit import ViT

TILE_SIDE = 240  # pixels
STRIP_HEIGHT = 8  # pixels of the strip below a map that shows the color of its head
TILES_PER_ROW = 9
# Five colors of matplotlib's viridis, from low to high. Copied, because only `results` may import
# matplotlib.
RAMP = (
    (68, 1, 84),
    (59, 82, 139),
    (33, 145, 140),
    (94, 201, 98),
    (253, 231, 37),
)
CAPTION = (
    "Attention of the class token in the last block. The first tile is the image. The second "
    "shows, over the image, the patches that hold {keep:.0%} of a head's attention to patches, in "
    "the color of the head (of the head that attends most where several meet). Then comes one map "
    "for each of the {heads} heads, with its color in the strip below: dark purple is zero, yellow "
    "is the largest value of that map."
)


@torch.no_grad()
def draw_attention(
    vit: ViT,
    source: Source,
    indices: Sequence[int],
    folder: Path,
    *,
    resize: int,
    crop: int,
    keep: float,
    device: torch.device,
    progress_path: Path | None = None,
) -> None:
    """Write `folder/image_<index>.png` for each of the given images; the ranks share the work."""
    own_indices = list(indices)[distributed.rank() :: distributed.world_size()]
    mean, std = (torch.tensor(values).view(3, 1, 1) for values in (IMAGENET_MEAN, IMAGENET_STD))
    progress = Progress(
        "attention",
        len(own_indices),
        unit="images",
        path=progress_path,
        quiet=not distributed.is_main(),
    )
    batches = iter_eval_batches(
        source, resize=resize, crop=crop, batch_size=1, indices=own_indices, device=device
    )
    for done, (images, _, ids) in enumerate(batches, 1):
        maps = vit.class_attention(images)[0].cpu().numpy()

        # Undo the normalization, so that the picture shows exactly the pixels the network saw.
        levels = ((images[0].cpu() * std + mean) * 255).round().clamp(0, 255).byte()
        save_png(
            folder / f"image_{int(ids[0]):06d}.png",
            compose_attention_picture(levels.permute(1, 2, 0).numpy(), maps, keep),
        )
        progress.update(done)
    progress.close()


def compose_attention_picture(pixels: np.ndarray, maps: np.ndarray, keep: float) -> np.ndarray:
    """Return the image (H, W, 3), its overlay of heads, and one tile per map (heads, h, w)."""
    image = resize_to_tile(pixels, Image.Resampling.BICUBIC)
    # Labels and maps are enlarged by nearest neighbor: a patch stays a visible square.
    labels = resize_to_tile(label_strongest_head(maps, keep), Image.Resampling.NEAREST)
    overlay = overlay_labels(image, labels, first=0)

    white = np.full((STRIP_HEIGHT, TILE_SIDE, 3), 255, np.uint8)
    tiles = [np.concatenate([image, white]), np.concatenate([overlay, white])]
    for head, values in enumerate(maps):
        strip = np.broadcast_to(label_colors()[head + 1], white.shape)
        heat = resize_to_tile(colorize_map(values), Image.Resampling.NEAREST)
        tiles.append(np.concatenate([heat, strip]))
    return arrange_in_grid(tiles)


def select_top_mass(maps: np.ndarray, keep: float) -> np.ndarray:
    """Select, per map (h, w), the fewest patches that hold at least a share `keep` of its sum.

    Returns booleans of the shape of `maps`, (heads, h, w).
    """
    flat = maps.reshape(len(maps), -1).astype(np.float64)
    # A stable sort, so that equal values are chosen in the order of the patches on every machine.
    order = np.argsort(-flat, axis=1, kind="stable")
    descending = np.take_along_axis(flat, order, axis=1)

    # A patch is needed as long as the larger ones before it have not reached the share.
    mass_before = np.cumsum(descending, axis=1) - descending
    selected = np.zeros(flat.shape, bool)
    needed = mass_before < keep * flat.sum(axis=1, keepdims=True)
    np.put_along_axis(selected, order, needed, axis=1)
    return selected.reshape(maps.shape)


def label_strongest_head(maps: np.ndarray, keep: float) -> np.ndarray:
    """Return, per patch, the number of the head that attends most to it, uint8 (h, w).

    Heads count from 1. A patch that no head selects (see `select_top_mass`) gets 0.
    """
    # Heads also attend to the class token, so their maps have different sums: compare shares.
    shares = maps / maps.sum(axis=(1, 2), keepdims=True)
    shown = np.where(select_top_mass(maps, keep), shares, 0)
    return np.where(shown.any(axis=0), shown.argmax(axis=0) + 1, 0).astype(np.uint8)


def colorize_map(values: np.ndarray) -> np.ndarray:
    """Color a map (h, w) from zero to its own largest value, uint8 (h, w, 3)."""
    places = np.linspace(0, 1, len(RAMP))
    shares = values / max(float(values.max()), 1e-12)
    channels = [np.interp(shares, places, levels) for levels in zip(*RAMP, strict=True)]
    return np.stack(channels, axis=-1).round().astype(np.uint8)


def resize_to_tile(pixels: np.ndarray, resample: Image.Resampling) -> np.ndarray:
    """Resize an image or a label map to the size of a tile."""
    return np.asarray(Image.fromarray(pixels).resize((TILE_SIDE, TILE_SIDE), resample))


def arrange_in_grid(tiles: Sequence[np.ndarray]) -> np.ndarray:
    """Arrange tiles in as few rows as possible, all of one length, at most nine tiles in each."""
    num_rows = -(-len(tiles) // TILES_PER_ROW)
    num_columns = -(-len(tiles) // num_rows)
    blank = np.full(tiles[0].shape, 255, np.uint8)
    padded = [*tiles, *[blank] * (num_rows * num_columns - len(tiles))]
    return one_below_the_other(
        [side_by_side(padded[i : i + num_columns]) for i in range(0, len(padded), num_columns)]
    )
