"""Encoded bytes -> RGB image, or an error that says which sample."""

import io

from PIL import Image, UnidentifiedImageError


class DecodeError(ValueError):
    """An image cannot be decoded; the message names it."""


def decode_rgb(data: bytes, name: str) -> Image.Image:
    """Fully decoded RGB image. Raises DecodeError for anything that is not a whole image."""
    try:
        with Image.open(io.BytesIO(data)) as image:
            image.load()
            return image if image.mode == "RGB" else image.convert("RGB")
    except UnidentifiedImageError as error:
        raise DecodeError(f"{name}: not an image of a known format") from error
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
        raise DecodeError(f"{name}: {error}") from error
