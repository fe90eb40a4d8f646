"""Videos with masks in the layout of DAVIS-2017 at 480p: checked and read.

    <root>/ImageSets/2017/val.txt               names of the videos, one per line
    <root>/JPEGImages/480p/<video>/00000.jpg    frames
    <root>/Annotations/480p/<video>/00000.png   an 8-bit map for each frame

A map holds 0 for background, 1 and up for objects, and 255 for void, which is read as 0.
"""

import logging
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from mugs.data.dense.label_maps import (
    VOID,
    check_items,
    check_map_size,
    raise_problems,
    read_map,
)
from mugs.data.dense.pixels import normalize_pixels
from mugs.data.dense.read_image import read_rgb_tensor
from mugs.data.prefetch import ProgressCallback
from mugs.data.sources.base import (
    SourceError,
    find_repeated,
    list_by_suffix,
    open_image,
    raise_if_any,
)
from mugs.data.sources.decode import decode_rgb

logger = logging.getLogger(__name__)
RESOLUTION = "480p"


class VideoFolder:
    """The videos of a split. Raises SourceError naming what is missing or does not pair up."""

    def __init__(self, root: Path, split: str = "val") -> None:
        self.root = root
        listing = root / "ImageSets" / "2017" / f"{split}.txt"
        if not listing.is_file():
            raise SourceError(
                f"{listing}: no such file (expected the folders of DAVIS-2017, trainval, 480p)"
            )
        self.names = listing.read_text(encoding="utf-8").split()
        if not self.names:
            raise SourceError(f"{listing}: names no video")
        # Averages are over the videos, so one that is named again would count twice.
        raise_if_any(listing, "videos are named again", find_repeated(self.names))
        raise_problems([line for line in map(self._find_missing, self.names) if line])

    def __len__(self) -> int:
        return len(self.names)

    def frames(self, video: str) -> list[Path]:
        """Return the images of a video in order."""
        return list_by_suffix(self.root / "JPEGImages" / RESOLUTION / video, ".jpg")

    def annotation(self, frame: Path) -> Path:
        """Return the path of the map of a frame."""
        return self.root / "Annotations" / RESOLUTION / frame.parent.name / f"{frame.stem}.png"

    def num_frames(self) -> int:
        """Return the number of frames of all videos."""
        return sum(len(self.frames(video)) for video in self.names)

    def check(self, video: str) -> None:
        """Read all files of a video. Raises an error naming one that cannot be used."""
        self.masks(video)
        # `masks` reads only the header of a frame, for its size.
        for frame in self.frames(video):
            decode_rgb(frame.read_bytes(), str(frame))

    def _find_missing(self, video: str) -> str | None:
        frames = self.frames(video)
        if len(frames) < 3:
            return (
                f"{self.root / 'JPEGImages' / RESOLUTION / video}: {len(frames)} frames (*.jpg), "
                "expected 3 or more (the first and the last do not count)"
            )
        # "10.jpg" comes before "2.jpg" by name.
        if len({len(frame.stem) for frame in frames if frame.stem.isdecimal()}) > 1:
            return (
                f"{frames[0].parent}: numbers of frames have fewer and more digits, so their order "
                "is not that of the names; add leading zeros"
            )
        missing = [self.annotation(f) for f in frames if not self.annotation(f).is_file()]
        if missing:
            return f"{missing[0]}: missing, and {len(missing) - 1} more of this video"
        return None

    def masks(self, video: str) -> np.ndarray:
        """Return the object numbers (T, H, W), uint8.

        Raises SourceError naming a map of another size.
        """
        maps: list[np.ndarray] = []
        for frame in self.frames(video):
            path = self.annotation(frame)
            values = read_map(path)
            values[values == VOID] = 0
            check_map_size(path, values.shape, image_size(frame))
            if maps and values.shape != maps[0].shape:
                raise SourceError(f"{path}: not of the size of the first map of {video}")
            maps.append(values)
        if not maps[0].any():
            raise SourceError(f"{self.annotation(self.frames(video)[0])}: no object to follow")
        stacked = np.stack(maps)
        # Objects are propagated from the first map. One that appears later cannot be followed, and
        # DAVIS' evaluator does not score it.
        if stacked.max() > maps[0].max():
            logger.warning(
                "%s: objects up to %d appear later; those above %d, the last of the first map, are "
                "not scored",
                video,
                stacked.max(),
                maps[0].max(),
            )
        return stacked


def image_size(path: Path) -> tuple[int, int]:
    """Return width and height of an image file. Raises SourceError naming it."""
    try:
        with open_image(path) as image:
            return image.size
    except OSError as error:
        raise SourceError(f"{path}: not a readable image ({error})") from error


def read_frame(
    path: Path, size: tuple[int, int], mean: tuple[float, ...], std: tuple[float, ...]
) -> Tensor:
    """Return a normalized frame (3, *size). Raises DecodeError."""
    # Bilinear without antialiasing and rounded to whole levels, as OpenCV resizes in the reference.
    resized = torch.nn.functional.interpolate(
        read_rgb_tensor(path)[None].float(), size=size, mode="bilinear", align_corners=False
    )[0]
    return normalize_pixels(resized.round(), mean, std)


def one_hot_patches(mask: np.ndarray, grid: tuple[int, int], num_objects: int) -> Tensor:
    """Return labels (P, 1 + O), 0 or 1, of the patches of a map (H, W), background first.

    A patch has the label of the pixel nearest to its center.
    """
    small = Image.fromarray(mask).resize((grid[1], grid[0]), Image.Resampling.NEAREST)
    labels = torch.from_numpy(np.array(small)).long().flatten()
    return torch.nn.functional.one_hot(labels, num_objects + 1).float()


def resize_map(labels: Tensor, height: int, width: int) -> np.ndarray:
    """Return a map (h, w), uint8, at the size of the video, by the nearest pixel."""
    image = Image.fromarray(labels.cpu().numpy())
    return np.asarray(image.resize((width, height), Image.Resampling.NEAREST))


def check_videos(
    videos: VideoFolder,
    num_videos: int,
    num_frames: int,
    *,
    threads: int,
    report: ProgressCallback,
) -> None:
    """Read every frame and map; `report` counts videos.

    Raises SourceError if the split holds another number of videos or frames than the data set
    should have, or names bad files.
    """
    wrong = [
        f"{found} {what} found, {wanted} expected"
        for what, found, wanted in (
            ("videos", len(videos), num_videos),
            ("frames", videos.num_frames(), num_frames),
        )
        if found != wanted
    ]
    # Reading takes minutes, so it waits until the counts are right.
    if wrong:
        raise SourceError(f"{videos.root}: {', '.join(wrong)}")
    check_items(videos.check, videos.names, threads, report)
