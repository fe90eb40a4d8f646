"""Maps of numbers, one a pixel, as PNG files."""

from pathlib import Path

import numpy as np
from PIL import Image

from mugs.data.sources.base import SourceError

VOID = 255


def read_map(path: Path) -> np.ndarray:
    """The numbers of an 8-bit PNG, grey or with a palette, (H, W). Raises SourceError naming the file."""
    try:
        with Image.open(path) as image:
            if image.mode not in ("L", "P"):
                raise SourceError(
                    f"{path}: a map of mode {image.mode}, expected 8 bits a pixel (L or P)"
                )
            return np.array(image)
    except (OSError, SyntaxError) as error:
        raise SourceError(f"{path}: not a readable PNG file ({error})") from error


def check_map_size(map_shape: tuple[int, ...], image_size: tuple[int, int]) -> str | None:
    """How a map (H, W) and its image (width, height) differ in size, in words, or None."""
    width, height = image_size
    if map_shape == (height, width):
        return None
    return f"{map_shape[1]} x {map_shape[0]} pixels, its image has {width} x {height}"
