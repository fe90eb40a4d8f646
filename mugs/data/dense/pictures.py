"""Show label maps in color, over their images and beside the truth."""

from collections.abc import Sequence
from functools import cache
from pathlib import Path

import numpy as np
from PIL import Image

from mugs.data.dense.label_maps import VOID
from pipeline.files import replace_atomically

# White pixels between pictures, and share of the color in the mix with the image.
GAP = 4
OPACITY = 0.6


@cache
def label_colors() -> np.ndarray:
    """Return the 256 colors of PASCAL VOC and DAVIS, uint8 (256, 3).

    Bits 0, 1 and 2 of a label are the highest bits of red, green and blue, bits 3, 4 and 5 the next
    ones, and so on. So neighboring labels have clearly different colors.
    """
    # bits[label, k, channel] is bit 3 k + channel of the label (bit 8 is always 0); it becomes bit
    # 7 - k of the channel.
    bits = (np.arange(256)[:, None] >> np.arange(9) & 1).reshape(256, 3, 3)
    table = np.asarray((bits << np.array([[7], [6], [5]])).sum(axis=1), np.uint8)
    # The cached array is shared by all callers.
    table.setflags(write=False)
    return table


def hex_colors(names: Sequence[str], *, first: int) -> dict[str, str]:
    """Return the colors `#rrggbb` of classes 0, 1, ... by name, as `overlay_labels` shows them."""
    table = np.roll(label_colors(), -first, axis=0)
    return {name: "#" + bytes(table[label].tolist()).hex() for label, name in enumerate(names)}


def overlay_labels(image: np.ndarray, labels: np.ndarray, *, first: int) -> np.ndarray:
    """Return an image (H, W, 3) under the colors of a label map (H, W).

    Label 0 has color number `first`, void has none. Color 0 is black and is not laid over the
    image: with `first` 0, label 0 is a background that is seen as it is.
    """
    color = np.roll(label_colors(), -first, axis=0)[labels]
    shown = (labels != VOID) & (color.any(axis=-1))
    mixed = (OPACITY * color + (1 - OPACITY) * image).round().astype(np.uint8)
    return np.asarray(np.where(shown[..., None], mixed, image))


def side_by_side(images: Sequence[np.ndarray]) -> np.ndarray:
    """Return images (H, W, 3) of one height in a row, with white between them."""
    gap = np.full((images[0].shape[0], GAP, 3), 255, np.uint8)
    parts = [part for image in images for part in (gap, image)][1:]
    return np.concatenate(parts, axis=1)


def save_png(path: Path, picture: np.ndarray) -> None:
    """Write a picture (H, W, 3) atomically."""
    with replace_atomically(path) as temporary:
        Image.fromarray(picture).save(temporary, format="PNG")


def one_below_the_other(images: Sequence[np.ndarray]) -> np.ndarray:
    """Put images (H, W, 3) of one width below each other, with white gaps."""
    row = side_by_side([image.transpose(1, 0, 2) for image in images])
    return np.ascontiguousarray(row.transpose(1, 0, 2))
