"""scikit-learn's handwritten digits as scenes with label maps and as videos: mini ADE20K and DAVIS.

Light digits on a dark, noisy ground, written in the layouts of the two data sets. Every fifth
digit, and no other, is used for validation.
"""

from pathlib import Path

import numpy as np
from numpy.random import Generator
from PIL import Image

from mugs.data.dense.pictures import label_colors
from mugs.data.mini.write_once import write_once
from mugs.random_streams import DemoStream, make_item_generator

# As written in a file, where 0 is void; digit d is d + 2.
BACKGROUND = 1
# Levels from which a pixel is no longer background, and from which it is digit. Between them, where
# the light of a digit fades, a scene is void: the truth there is a matter of taste.
EDGE = 40
BODY = 110
SIZES = ((64, 64), (64, 80), (80, 64))


def load_digit_split(split: str) -> tuple[np.ndarray, np.ndarray]:
    """Return the digits of "train" or "val": images (n, 8, 8), levels 0 to 16, and labels (n,)."""
    from sklearn.datasets import load_digits

    digits = load_digits()
    chosen = (np.arange(len(digits.target)) % 5 == 0) == (split == "val")
    return digits.images[chosen], digits.target[chosen]


@write_once
def materialize_scenes(
    root: Path, *, train: int, val: int, classes: int = 10, seed: int = 0
) -> None:
    """Write scenes of the digits 0 to `classes` - 1 below root in ADE20K's layout, if not there."""
    for split, name, count, stream in (
        ("train", "training", train, DemoStream.TRAIN_SCENES),
        ("val", "validation", val, DemoStream.VAL_SCENES),
    ):
        digits, digit_labels = load_digit_split(split)
        images = root / "images" / name
        annotations = root / "annotations" / name
        images.mkdir(parents=True)
        annotations.mkdir(parents=True)
        for index in range(count):
            rng = make_item_generator(seed, index, stream)
            image, labels = draw_labeled_scene(digits, digit_labels, rng, classes)
            image.save(images / f"{name}_{index:04d}.jpg", quality=95)
            Image.fromarray(labels).save(annotations / f"{name}_{index:04d}.png")


def draw_labeled_scene(
    digits: np.ndarray, digit_labels: np.ndarray, rng: Generator, classes: int
) -> tuple[Image.Image, np.ndarray]:
    """Draw a picture with two to four digits in its quarters, and its label map."""
    height, width = SIZES[rng.integers(len(SIZES))]
    light = draw_dark_noise(height, width, rng)
    labels = np.full((height, width), BACKGROUND, np.uint8)
    usable = np.flatnonzero(digit_labels < classes)
    for quarter in rng.permutation(4)[: rng.integers(2, 5)]:
        chosen = rng.choice(usable)
        size = int(rng.integers(26, 33))
        top = (quarter // 2) * (height // 2) + int(rng.integers(0, height // 2 - size + 1))
        left = (quarter % 2) * (width // 2) + int(rng.integers(0, width // 2 - size + 1))
        shape = scale_digit(digits[chosen], size)
        paste_digit(light, shape, top, left)
        part = labels[top : top + size, left : left + size]
        part[shape > EDGE] = 0
        part[shape > BODY] = digit_labels[chosen] + 2
    return Image.fromarray(light).convert("RGB"), labels


@write_once
def materialize_videos(root: Path, *, videos: int, frames: int, seed: int = 0) -> None:
    """Write videos of two moving validation digits each in DAVIS-2017's layout, if not there."""
    digits, _ = load_digit_split("val")
    names = [f"digits_{index:02d}" for index in range(videos)]
    for index, name in enumerate(names):
        write_video(root, name, digits, frames, make_item_generator(seed, index, DemoStream.VIDEOS))
    listing = root / "ImageSets" / "2017" / "val.txt"
    listing.parent.mkdir(parents=True)
    listing.write_text("".join(f"{name}\n" for name in names), encoding="utf-8")


def write_video(root: Path, name: str, digits: np.ndarray, frames: int, rng: Generator) -> None:
    """Write frames and maps of a video: two digits that move, grow and bounce off the sides."""
    height = 64
    width = 96
    images, annotations = (root / kind / "480p" / name for kind in ("JPEGImages", "Annotations"))
    images.mkdir(parents=True)
    annotations.mkdir(parents=True)
    # The order of these draws is part of the data set.
    chosen = rng.choice(len(digits), 2, replace=False)
    sizes = rng.uniform(26, 32, 2)
    # One digit begins on the left and one on the right, so that neither hides the other in the
    # first map.
    place = np.stack(
        [rng.uniform(0, height - 32, 2), [rng.uniform(0, 8), rng.uniform(50, 64)]], axis=1
    )
    speed = rng.uniform(1.0, 2.0, (2, 2)) * rng.choice([-1, 1], (2, 2))
    backdrop = draw_dark_noise(height, width, rng)
    for frame in range(frames):
        light = backdrop.copy()
        ids = np.zeros((height, width), np.uint8)
        for number, digit in enumerate(chosen):
            size = round(sizes[number] * (1 + 0.01 * frame))
            room = np.array([height - size, width - size])
            top, left = bounce_position(place[number] + frame * speed[number], room).astype(int)
            shape = scale_digit(digits[digit], size)
            paste_digit(light, shape, top, left)
            ids[top : top + size, left : left + size][shape > BODY] = number + 1
        Image.fromarray(light).convert("RGB").save(images / f"{frame:05d}.jpg", quality=95)
        annotation = Image.fromarray(ids)
        annotation.putpalette(label_colors()[:5].flatten().tolist())
        annotation.save(annotations / f"{frame:05d}.png")


def draw_dark_noise(height: int, width: int, rng: Generator) -> np.ndarray:
    """Draw a dark, noisy ground, uint8."""
    return rng.integers(0, 24, (height, width), dtype=np.uint8)


def scale_digit(pixels: np.ndarray, size: int) -> np.ndarray:
    """Return a digit of 8 x 8 levels at size x size, uint8."""
    small = Image.fromarray((pixels * (255 / 16)).clip(0, 255).astype(np.uint8))
    return np.asarray(small.resize((size, size), Image.Resampling.BICUBIC))


def paste_digit(light: np.ndarray, shape: np.ndarray, top: int, left: int) -> None:
    """Put a digit into the picture; the lighter pixel wins."""
    part = light[top : top + shape.shape[0], left : left + shape.shape[1]]
    np.maximum(part, shape, out=part)


def bounce_position(position: np.ndarray, room: np.ndarray) -> np.ndarray:
    """Return a position that bounces between 0 and `room`, from the one without walls."""
    # There and back is one period of 2 * room; the second half is mirrored.
    folded = np.mod(position, 2 * room)
    return np.asarray(np.where(folded > room, 2 * room - folded, folded))
