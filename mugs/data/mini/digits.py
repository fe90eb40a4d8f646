"""scikit-learn's 1,797 handwritten digits as an image folder: real images that need no download."""

from pathlib import Path

import numpy as np
from PIL import Image

from pipeline.files import replace_atomically

SIDE = 40


def materialize_digits(root: Path) -> None:
    """Write `root/train/<digit>/*.jpg` and `root/val/...` (every fifth image), unless they are there.

    Light digits on a dark ground, 40 x 40 pixels, each turned, moved and scaled a little, so that images of a class
    differ by more than handwriting.
    """
    if root.is_dir():
        return
    from sklearn.datasets import load_digits

    digits = load_digits()
    rng = np.random.Generator(np.random.Philox(0))
    with replace_atomically(root) as temporary:
        for index, (pixels, label) in enumerate(zip(digits.images, digits.target, strict=True)):
            split = "val" if index % 5 == 0 else "train"
            folder = temporary / split / str(label)
            folder.mkdir(parents=True, exist_ok=True)
            _picture(pixels, rng).save(folder / f"digit_{index:04d}.jpg", quality=95)


def _picture(pixels: np.ndarray, rng: np.random.Generator) -> Image.Image:
    small = Image.fromarray((pixels * (255 / 16)).clip(0, 255).astype(np.uint8))
    picture = Image.new("L", (SIDE, SIDE))
    picture.paste(small.resize((32, 32), Image.Resampling.BICUBIC), (4, 4))
    angle, scale = rng.uniform(-10, 10), rng.uniform(0.9, 1.1)
    moved = picture.rotate(
        angle, Image.Resampling.BICUBIC, translate=tuple(rng.integers(-3, 4, 2).tolist())
    )
    half, side = SIDE / 2, SIDE / scale
    box = (half - side / 2, half - side / 2, half + side / 2, half + side / 2)
    return moved.transform(
        (SIDE, SIDE), Image.Transform.EXTENT, box, Image.Resampling.BICUBIC
    ).convert("RGB")
