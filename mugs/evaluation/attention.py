"""Pictures of what the class token attends to in the last block, head by head (the paper's Figures 4 and 6).

H, W pixels, h, w patches. No code of these figures is released; 480 pixels and 60% are those of DINO's.
"""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from mugs import distributed
from mugs.data.dense.pictures import GAP, label_colors, overlay_labels, save_png, side_by_side
from mugs.data.loading.evaluation import iter_eval_batches
from mugs.data.sources.base import Source
from mugs.data.views.config import IMAGENET_MEAN, IMAGENET_STD
from mugs.engine.progress import Progress
from mugs.models.vit import ViT

SIDE, STRIP = 240, 8  # pixels of a tile, and of the strip in the colour of its head below it
IN_A_ROW = 9
RAMP = (
    (68, 1, 84),
    (59, 82, 139),
    (33, 145, 140),
    (94, 201, 98),
    (253, 231, 37),
)  # five colours of viridis
CAPTION = (
    "Attention of the class token in the last block. First the image; then, over it, the patches that hold {keep:.0%} "
    "of a head's attention to patches, in the colour of the head (the one that attends most where several meet); then "
    "a map for each of the {heads} heads, in the order of the strips' colours: dark purple is none, yellow that map's "
    "largest value."
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
    """`folder/image_<index>.png` for each of these images; ranks take turns."""
    mine = list(indices)[distributed.rank() :: distributed.world_size()]
    mean, std = (torch.tensor(values).view(3, 1, 1) for values in (IMAGENET_MEAN, IMAGENET_STD))
    progress = Progress(
        "attention", len(mine), unit="images", path=progress_path, quiet=not distributed.is_main()
    )
    for done, (images, _, ids) in enumerate(
        iter_eval_batches(source, resize=resize, crop=crop, batch_size=1, indices=mine), 1
    ):
        maps = vit.class_attention(images.to(device))[0].cpu().numpy()
        pixels = (
            ((images[0] * std + mean) * 255).round().clamp(0, 255).byte().permute(1, 2, 0).numpy()
        )
        save_png(
            folder / f"image_{int(ids[0]):06d}.png", compose_attention_picture(pixels, maps, keep)
        )
        progress.update(done)
    progress.close()


def compose_attention_picture(pixels: np.ndarray, maps: np.ndarray, keep: float) -> np.ndarray:
    """Image (H, W, 3), what the heads look at most over it, and a tile for each of the maps (heads, h, w)."""
    image = resize_to_tile(pixels, Image.Resampling.BICUBIC)
    labels = resize_to_tile(label_strongest_head(maps, keep), Image.Resampling.NEAREST)
    plain = np.full((STRIP, SIDE, 3), 255, np.uint8)
    tiles = [
        np.concatenate([part, plain]) for part in (image, overlay_labels(image, labels, first=0))
    ]
    for head, values in enumerate(maps):
        strip = np.broadcast_to(label_colors()[head + 1], plain.shape)
        tiles.append(
            np.concatenate([resize_to_tile(colorize_map(values), Image.Resampling.NEAREST), strip])
        )
    return arrange_in_grid(tiles)


def select_top_mass(maps: np.ndarray, keep: float) -> np.ndarray:
    """Which patches (heads, h, w): of each map the fewest that hold at least a share `keep` of its sum."""
    flat = maps.reshape(len(maps), -1).astype(np.float64)
    order = np.argsort(-flat, axis=1, kind="stable")
    descending = np.take_along_axis(flat, order, axis=1)
    before = np.cumsum(descending, axis=1) - descending
    chosen = np.zeros(flat.shape, bool)
    np.put_along_axis(chosen, order, before < keep * flat.sum(axis=1, keepdims=True), axis=1)
    return chosen.reshape(maps.shape)


def label_strongest_head(maps: np.ndarray, keep: float) -> np.ndarray:
    """Number, from 1, of the head that attends most to a patch it keeps, uint8 (h, w); 0 where none keeps it."""
    shares = maps / maps.sum(axis=(1, 2), keepdims=True)
    shown = np.where(select_top_mass(maps, keep), shares, 0)
    return np.where(shown.any(axis=0), shown.argmax(axis=0) + 1, 0).astype(np.uint8)


def colorize_map(values: np.ndarray) -> np.ndarray:
    """Colours (h, w, 3) of a map: 0 to its largest value."""
    places = np.linspace(0, 1, len(RAMP))
    shares = values / max(float(values.max()), 1e-12)
    channels = [np.interp(shares, places, levels) for levels in zip(*RAMP, strict=True)]
    return np.stack(channels, axis=-1).round().astype(np.uint8)


def resize_to_tile(pixels: np.ndarray, resample: Image.Resampling) -> np.ndarray:
    """An image or label map at the size of a tile."""
    return np.asarray(Image.fromarray(pixels).resize((SIDE, SIDE), resample))


def arrange_in_grid(tiles: Sequence[np.ndarray]) -> np.ndarray:
    """Tiles in rows of one length, at most nine in each."""
    rows = -(-len(tiles) // IN_A_ROW)
    columns = -(-len(tiles) // rows)
    blank = np.full(tiles[0].shape, 255, np.uint8)
    padded = [*tiles, *[blank] * (rows * columns - len(tiles))]
    lines = [
        side_by_side(padded[first : first + columns]) for first in range(0, len(padded), columns)
    ]
    gap = np.full((GAP, lines[0].shape[1], 3), 255, np.uint8)
    return np.concatenate([part for line in lines for part in (gap, line)][1:])
