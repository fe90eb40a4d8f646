"""Label maps in colour, over their images and beside the truth."""

from collections.abc import Sequence
from functools import cache
from pathlib import Path

import numpy as np
from PIL import Image

from mugs.data.dense.label_maps import VOID
from pipeline.files import replace_atomically

GAP = 4
OPACITY = 0.6


@cache
def label_colors() -> np.ndarray:
    """The 256 colours of PASCAL VOC and DAVIS, uint8 (256, 3): the bits of a label, spread over red, green and blue."""
    table = np.zeros((256, 3), np.uint8)
    for label in range(256):
        rest = label
        for shift in range(7, -1, -1):
            for channel in range(3):
                table[label, channel] |= ((rest >> channel) & 1) << shift
            rest >>= 3
    table.setflags(write=False)
    return table


def hex_colors(names: Sequence[str], *, first: int) -> dict[str, str]:
    """`#rrggbb` of classes 0, 1, ... by name, as `overlay` shows them."""
    table = np.roll(label_colors(), -first, axis=0)
    return {name: "#" + bytes(table[label].tolist()).hex() for label, name in enumerate(names)}


def overlay_labels(image: np.ndarray, labels: np.ndarray, *, first: int) -> np.ndarray:
    """Image (H, W, 3) under the colours of a label map (H, W); label 0 has colour number `first`, void has none.

    Where the colour is black (`first` 0, label 0) the image is seen as it is.
    """
    table = np.roll(label_colors(), -first, axis=0)
    colour = table[labels]
    shown = (labels != VOID) & (colour.any(axis=-1))
    mixed = (OPACITY * colour + (1 - OPACITY) * image).round().astype(np.uint8)
    picture: np.ndarray = np.where(shown[..., None], mixed, image)
    return picture


def side_by_side(images: Sequence[np.ndarray]) -> np.ndarray:
    """Images (H, W, 3) of one height in a row, white between them."""
    gap = np.full((images[0].shape[0], GAP, 3), 255, np.uint8)
    parts = [part for image in images for part in (gap, image)][1:]
    return np.concatenate(parts, axis=1)


def save_png(path: Path, picture: np.ndarray) -> None:
    """Write a picture (H, W, 3), whole or not at all."""
    with replace_atomically(path) as temporary:
        Image.fromarray(picture).save(temporary, format="PNG")
