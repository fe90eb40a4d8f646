"""Maps of numbers, one per pixel, as PNG files."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TypeVar

import numpy as np

from mugs.data.prefetch import ProgressCallback, map_prefetched, with_progress
from mugs.data.sources.base import SourceError, format_names, open_image
from mugs.data.sources.decode import DecodeError

T = TypeVar("T")

# Pixels that count for nothing, in ADE20K, DAVIS and PASCAL VOC alike.
VOID = 255


def read_map(path: Path) -> np.ndarray:
    """Return the numbers (H, W) of an 8-bit PNG, gray or with a palette.

    Raises SourceError naming the file.
    """
    try:
        with open_image(path) as image:
            # Any other mode would be converted to 8 bits, which changes the numbers without an
            # error.
            if image.mode not in ("L", "P"):
                raise SourceError(
                    f"{path}: a map of mode {image.mode}, expected 8 bits a pixel (L or P)"
                )
            return np.array(image)
    except (OSError, SyntaxError) as error:
        raise SourceError(f"{path}: not a readable PNG file ({error})") from error


def check_map_size(path: Path, shape: tuple[int, ...], image_size: tuple[int, int]) -> None:
    """Raise SourceError unless a map (H, W) has the size (width, height) of its image."""
    width, height = image_size
    if shape != (height, width):
        raise SourceError(
            f"{path}: {shape[1]} x {shape[0]} pixels, its image has {width} x {height}"
        )


def check_items(
    check: Callable[[T], object], items: Sequence[T], threads: int, report: ProgressCallback
) -> None:
    """Call `check` for every item in a pool of threads.

    Raises SourceError, in one line, with what it raised about files.
    """

    def find_problem(item: T) -> str | None:
        try:
            check(item)
        except (SourceError, DecodeError, OSError) as error:
            return str(error)
        return None

    lines = with_progress(map_prefetched(find_problem, items, threads), len(items), report)
    raise_problems([line for line in lines if line])


def raise_problems(problems: Sequence[str]) -> None:
    """Raise SourceError naming the first problems, if there are any."""
    if problems:
        raise SourceError(f"{len(problems)} problems: {format_names(problems)}")
