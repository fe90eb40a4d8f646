"""Patches of the two photographs that scikit-learn ships, as an image folder: another data set to transfer to.

A patch's class is where it was cut: the photograph (china.jpg, flower.jpg), and which third of its width and which half
of its height. Real images in colour, but of two scenes only, and neighbouring regions look alike: it shows that
transfer works from end to end, and measures nothing else.
"""

from collections.abc import Iterator
from pathlib import Path

import numpy as np
from PIL import Image

from pipeline.files import replace_atomically

SIDE = 24
ROWS, COLUMNS = 2, 3


def materialize_patches(root: Path) -> None:
    """Write `root/train/<class>/*.jpg` and `root/val/...` (every fifth patch), unless they are there.

    Patches of 24 x 24 pixels lie side by side, so that none shares a pixel with another: 614 and 154 in 12 classes.
    """
    if root.is_dir():
        return
    from sklearn.datasets import load_sample_images

    samples = load_sample_images()  # type: ignore[no-untyped-call]
    names = [Path(name).stem for name in samples.filenames]
    patches = [
        patch
        for name, pixels in zip(names, samples.images, strict=True)
        for patch in cut_patches(name, pixels)
    ]
    with replace_atomically(root) as temporary:
        for index, (region, patch) in enumerate(patches):
            folder = temporary / ("val" if index % 5 == 0 else "train") / region
            folder.mkdir(parents=True, exist_ok=True)
            Image.fromarray(patch).save(folder / f"patch_{index:04d}.jpg", quality=95)


def cut_patches(name: str, pixels: np.ndarray) -> Iterator[tuple[str, np.ndarray]]:
    """Region and pixels (24, 24, 3) of every patch of a photograph (H, W, 3), region by region."""
    height, width = pixels.shape[0] // ROWS, pixels.shape[1] // COLUMNS
    for row, column in np.ndindex(ROWS, COLUMNS):
        region = pixels[row * height : (row + 1) * height, column * width : (column + 1) * width]
        for top, left in np.ndindex(height // SIDE, width // SIDE):
            patch = region[top * SIDE : (top + 1) * SIDE, left * SIDE : (left + 1) * SIDE]
            yield f"{name}_row{row}_column{column}", patch
