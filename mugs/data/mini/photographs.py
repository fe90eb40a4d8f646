"""Patches of the two photographs that scikit-learn ships, as an image folder to transfer to.

A patch's class is where it was cut: the photograph (china.jpg, flower.jpg), which third of its
width and which half of its height. These are real images in color, but of two scenes only, and
neighboring regions look alike: they show that transfer works from end to end, and measure nothing
else.
"""

from collections.abc import Iterator
from pathlib import Path

import numpy as np
from PIL import Image

from mugs.data.mini.write_once import write_once

SIDE = 24
ROWS = 2
COLUMNS = 3


@write_once
def materialize_patches(root: Path) -> None:
    """Write `root/train/<class>/*.jpg` and `root/val/...` (every fifth patch), if not there.

    614 and 154 patches of 24 x 24 pixels in 12 classes.
    """
    from sklearn.datasets import load_sample_images

    samples = load_sample_images()  # type: ignore[no-untyped-call]
    patches = [
        patch
        for name, pixels in zip(samples.filenames, samples.images, strict=True)
        for patch in cut_patches(Path(name).stem, pixels)
    ]
    for index, (region, patch) in enumerate(patches):
        folder = root / ("val" if index % 5 == 0 else "train") / region
        folder.mkdir(parents=True, exist_ok=True)
        Image.fromarray(patch).save(folder / f"patch_{index:04d}.jpg", quality=95)


def cut_patches(name: str, pixels: np.ndarray) -> Iterator[tuple[str, np.ndarray]]:
    """Yield region and pixels (24, 24, 3) of every patch of a photograph (H, W, 3), by region."""
    height = pixels.shape[0] // ROWS
    width = pixels.shape[1] // COLUMNS
    for row, column in np.ndindex(ROWS, COLUMNS):
        region = pixels[row * height : (row + 1) * height, column * width : (column + 1) * width]
        # Side by side: no pixel is in two patches, so none is in both splits.
        for top, left in np.ndindex(height // SIDE, width // SIDE):
            patch = region[top * SIDE : (top + 1) * SIDE, left * SIDE : (left + 1) * SIDE]
            yield f"{name}_row{row}_column{column}", patch
