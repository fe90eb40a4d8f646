"""Maps of numbers, one per pixel, as PNG files."""

from pathlib import Path

import numpy as np
from PIL import Image

from mugs.data.sources.base import SourceError

# Pixels that count for nothing, in ADE20K, DAVIS and PASCAL VOC alike.
VOID = 255


def read_map(path: Path) -> np.ndarray:
    """Return the numbers (H, W) of an 8-bit PNG, gray or with a palette.

    Raises SourceError naming the file.
    """
    try:
        with Image.open(path) as image:
            # Any other mode would be converted to 8 bits, which changes the numbers without an
            # error.
            if image.mode not in ("L", "P"):
                raise SourceError(
                    f"{path}: a map of mode {image.mode}, expected 8 bits a pixel (L or P)"
                )
            return np.array(image)
    except (OSError, SyntaxError) as error:
        raise SourceError(f"{path}: not a readable PNG file ({error})") from error


def check_map_size(path: Path, shape: tuple[int, ...], image_size: tuple[int, int]) -> None:
    """Raise SourceError unless a map (H, W) has the size (width, height) of its image."""
    width, height = image_size
    if shape != (height, width):
        raise SourceError(
            f"{path}: {shape[1]} x {shape[0]} pixels, its image has {width} x {height}"
        )
