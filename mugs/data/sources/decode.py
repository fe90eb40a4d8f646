"""Decode an image, or raise an error that says which one."""

import io

import numpy as np
from PIL import Image, UnidentifiedImageError

from mugs.data.sources.base import open_image
from mugs.data.sources.changes import is_wide

# Formats of which Pillow hands out 16-bit gray as 32-bit integers: PGM, and PNG in older versions.
WIDE_GRAY = ("PNG", "PPM")


class DecodeError(ValueError):
    """An image cannot be decoded; the message names it."""


def decode_rgb(data: bytes, name: str) -> Image.Image:
    """Return the decoded RGB image. Raises DecodeError for anything that is not a whole image."""
    try:
        with open_image(io.BytesIO(data)) as image:
            wide = is_wide(image)
            # Image.open reads the header only.
            image.load()
            rgb = convert_to_rgb(image, name)
            if wide:
                check_bits_are_used(rgb, name)
            return rgb
    except UnidentifiedImageError as error:
        raise DecodeError(f"{name}: not an image of a known format") from error
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
        # Damaged files make Pillow raise all of these.
        raise DecodeError(f"{name}: {error}") from error


def check_bits_are_used(rgb: Image.Image, name: str) -> None:
    """Raise DecodeError for what was 16 bits if no value uses the upper four: 8 bits are black."""
    brightest = int(np.asarray(rgb).max())
    if 0 < brightest < 16:
        raise DecodeError(
            f"{name}: 16 bits, of which no pixel uses the upper four, and the file does not say "
            "which value is white; scale it to 8 or 16 bits"
        )


def convert_to_rgb(image: Image.Image, name: str) -> Image.Image:
    """Return a decoded image as RGB; 16 bits become 8, as Pillow reads 16-bit color: the upper 8.

    Raises DecodeError for 32-bit integers and floating point, whose range no file states.
    """
    # Image.convert would clip all of these: what is above 255 becomes white.
    if image.mode.startswith("I;16") or (image.mode == "I" and image.format in WIDE_GRAY):
        gray = np.asarray(image).astype(np.int64)
        if gray.min() < 0 or gray.max() > 65535:
            raise DecodeError(f"{name}: values beyond 16 bits")
        image = Image.fromarray((gray >> 8).astype(np.uint8))
    elif image.mode in ("I", "F"):
        kind = "32-bit integers" if image.mode == "I" else "floating-point numbers"
        raise DecodeError(
            f"{name}: pixels are {kind}, and the file does not say which is white; "
            "save it with 8 or 16 bits"
        )
    return image if image.mode == "RGB" else image.convert("RGB")
