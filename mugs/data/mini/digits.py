"""scikit-learn's 1,797 handwritten digits as an image folder: real images that need no download."""

from pathlib import Path

import numpy as np
from PIL import Image

from mugs.data.mini.write_once import write_once

SIDE = 40


@write_once
def materialize_digits(root: Path) -> None:
    """Write `root/train/<digit>/*.jpg` and `root/val/...` (every fifth image), if not there.

    Light digits on a dark ground, 40 x 40 pixels, each turned, moved and scaled a little.
    """
    # Imported here, as scikit-learn takes a second to import and most runs do not need it.
    from sklearn.datasets import load_digits

    digits = load_digits()
    rng = np.random.Generator(np.random.Philox(0))
    for index, (pixels, label) in enumerate(zip(digits.images, digits.target, strict=True)):
        folder = root / ("val" if index % 5 == 0 else "train") / str(label)
        folder.mkdir(parents=True, exist_ok=True)
        _jitter_digit(pixels, rng).save(folder / f"digit_{index:04d}.jpg", quality=95)


def _jitter_digit(pixels: np.ndarray, rng: np.random.Generator) -> Image.Image:
    # Images of a class should differ by more than handwriting, so that augmentations have something
    # to be invariant to. The pixels are levels from 0 to 16.
    small = Image.fromarray((pixels * (255 / 16)).clip(0, 255).astype(np.uint8))
    picture = Image.new("L", (SIDE, SIDE))
    picture.paste(small.resize((32, 32), Image.Resampling.BICUBIC), (4, 4))
    # The order of these draws is part of the data set.
    angle = rng.uniform(-10, 10)
    scale = rng.uniform(0.9, 1.1)
    shift = tuple(rng.integers(-3, 4, 2).tolist())
    moved = picture.rotate(angle, Image.Resampling.BICUBIC, translate=shift)
    half = SIDE / 2
    reach = SIDE / scale / 2
    box = (half - reach, half - reach, half + reach, half + reach)
    scaled = moved.transform((SIDE, SIDE), Image.Transform.EXTENT, box, Image.Resampling.BICUBIC)
    return scaled.convert("RGB")
