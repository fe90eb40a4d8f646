"""What training sees otherwise than an image viewer shows it, found in the headers of the files."""

from collections.abc import Iterable

import numpy as np
from PIL import ExifTags, Image

# A bit each, in this order, in the working files of a conversion: add new ones at the end.
KINDS = (
    "gray, made RGB",
    "palette, made RGB",
    "transparency dropped",
    "CMYK, made RGB",
    "other colors, made RGB",
    "16 bits, made 8",
    "orientation tag not followed",
    "color profile not applied",
    "stored anew as JPEG",
    "first of several pictures in the file",
)
BY_MODE = {
    "RGB": (),
    "L": (0,),
    "1": (0,),
    "P": (1,),
    "RGBA": (2,),
    "RGBX": (2,),
    "LA": (0, 2),
    "La": (0, 2),
    "PA": (1, 2),
    "CMYK": (3,),
}
# Part of the description in a profile; newer ones hold it in UTF-16.
SRGB = (b"sRGB", "sRGB".encode("utf-16-be"))
TRANSPARENT, WIDE, TURNED, PROFILE, ANEW, SEVERAL = 2, 5, 6, 7, 8, 9


def is_wide(image: Image.Image) -> bool:
    """Return whether an image that was opened and not loaded yet has more than 8 bits a value."""
    if image.mode.startswith("I"):
        return True
    # Pillow reads 16-bit color as 8 bits, and only the arguments of its decoder tell: the raw mode,
    # or the largest value of PPM.
    for tile in getattr(image, "tile", ()):
        mode, *rest = tile[3] if isinstance(tile[3], tuple) else (tile[3],)
        if ";16" in str(mode) or (tile[0].startswith("ppm") and rest and max(rest) > 255):
            return True
    return False


def find_changes(image: Image.Image, *, stored_anew: bool) -> int:
    """Return the bits of what holds for an image that was opened and not loaded yet."""
    found = set(BY_MODE.get(image.mode, (4,)))
    if image.mode.startswith("I"):
        found = {0}
    if is_wide(image):
        found.add(WIDE)
    # Palettes, and gray and RGB PNG files, may name a color that is transparent.
    if "transparency" in image.info:
        found.add(TRANSPARENT)
    # Pillow turns TIFF as its tag says.
    has_exif = "exif" in image.info or image.format not in ("JPEG", "TIFF")
    if has_exif and image.getexif().get(ExifTags.Base.Orientation, 1) not in (0, 1):
        found.add(TURNED)
    profile = image.info.get("icc_profile")
    if profile and not any(name in profile for name in SRGB):
        found.add(PROFILE)
    if stored_anew:
        found.add(ANEW)
    # Frames of an animation, pages, or what telephones add to a JPEG (which Pillow then calls MPO).
    if getattr(image, "n_frames", 1) > 1:
        found.add(SEVERAL)
    return sum(1 << bit for bit in found)


def count_changes(bits: np.ndarray) -> dict[str, int]:
    """Return in how many images each kind was found; those that were in none are left out."""
    counts = [int(np.count_nonzero(bits & (1 << bit))) for bit in range(len(KINDS))]
    return {kind: count for kind, count in zip(KINDS, counts, strict=True) if count}


def describe_changes(split: str, counts: Iterable[tuple[str, int]]) -> list[str]:
    """Return a line for each kind."""
    return [f"{split}: {count:,} images: {kind}" for kind, count in counts]
