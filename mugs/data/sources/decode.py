"""Decode an image, or raise an error that says which one."""

import io
from pathlib import Path

import numpy as np
import torch
from PIL import Image, UnidentifiedImageError
from torch import Tensor


class DecodeError(ValueError):
    """An image cannot be decoded; the message names it."""


def decode_rgb(data: bytes, name: str) -> Image.Image:
    """Return the decoded RGB image. Raises DecodeError for anything that is not a whole image."""
    try:
        with Image.open(io.BytesIO(data)) as image:
            # Image.open reads the header only.
            image.load()
            return image if image.mode == "RGB" else image.convert("RGB")
    except UnidentifiedImageError as error:
        raise DecodeError(f"{name}: not an image of a known format") from error
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
        # Damaged files make Pillow raise all of these.
        raise DecodeError(f"{name}: {error}") from error


def read_rgb_tensor(path: Path) -> Tensor:
    """Return the pixels of an image file, uint8 (3, H, W). Raises DecodeError and OSError."""
    pixels = np.array(decode_rgb(path.read_bytes(), str(path)))
    return torch.from_numpy(pixels).permute(2, 0, 1)
