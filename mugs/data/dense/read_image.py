"""Read an image file as a tensor."""

from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from mugs.data.sources.base import MAX_IMAGE_BYTES
from mugs.data.sources.decode import decode_rgb
from pipeline.files import read_bounded


def read_rgb_tensor(path: Path) -> Tensor:
    """Return the pixels of an image file, uint8 (3, H, W). Raises DecodeError and OSError."""
    pixels = np.array(decode_rgb(read_bounded(path, MAX_IMAGE_BYTES), str(path)))
    return torch.from_numpy(pixels).permute(2, 0, 1)
