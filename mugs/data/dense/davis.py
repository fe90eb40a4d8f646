"""Videos with masks: the layout of DAVIS-2017 at 480p, checked and read.

<root>/ImageSets/2017/val.txt               names of the videos, one a line
<root>/JPEGImages/480p/<video>/00000.jpg    frames
<root>/Annotations/480p/<video>/00000.png   one 8-bit map for each: 0 background, 1 ... objects, 255 void (as 0)
"""

from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from mugs.data.dense.label_maps import VOID, check_map_size, read_map
from mugs.data.dense.pixels import normalize_pixels
from mugs.data.prefetch import ProgressCallback, map_prefetched, with_progress
from mugs.data.sources.base import SourceError, format_names
from mugs.data.sources.decode import DecodeError, decode_rgb

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
        problems = [line for line in map(self._problem, self.names) if line]
        if problems:
            raise SourceError(f"{len(problems)} problems: {format_names(problems)}")

    def __len__(self) -> int:
        return len(self.names)

    def frames(self, video: str) -> list[Path]:
        """Images of a video in order."""
        return sorted((self.root / "JPEGImages" / RESOLUTION / video).glob("*.jpg"))

    def annotation(self, frame: Path) -> Path:
        """The map of a frame."""
        return self.root / "Annotations" / RESOLUTION / frame.parent.name / f"{frame.stem}.png"

    def num_frames(self) -> int:
        """Frames of all videos."""
        return sum(len(self.frames(video)) for video in self.names)

    def problem(self, index: int) -> str | None:
        """Why a video cannot be used, naming the file, or None."""
        video = self.names[index]
        try:
            self.masks(video)
            for frame in self.frames(video):
                decode_rgb(frame.read_bytes(), str(frame))
        except (SourceError, DecodeError, OSError) as error:
            return str(error)
        return None

    def _problem(self, video: str) -> str:
        frames = self.frames(video)
        if len(frames) < 3:
            folder = self.root / "JPEGImages" / RESOLUTION / video
            return f"{folder}: {len(frames)} frames (*.jpg), expected 3 or more (the first and the last do not count)"
        missing = [self.annotation(f) for f in frames if not self.annotation(f).is_file()]
        return (
            f"{missing[0]}: missing, and {len(missing) - 1} more of this video" if missing else ""
        )

    def masks(self, video: str) -> np.ndarray:
        """Object numbers (T, H, W), uint8. Raises SourceError naming a map of another size or with a new object."""
        maps: list[np.ndarray] = []
        for frame in self.frames(video):
            path = self.annotation(frame)
            values = read_map(path)
            values[values == VOID] = 0
            if differ := check_map_size(values.shape, image_size(frame)):
                raise SourceError(f"{path}: {differ}")
            if maps and values.shape != maps[0].shape:
                raise SourceError(f"{path}: not of the size of the first map of {video}")
            if maps and values.max() > maps[0].max():
                raise SourceError(
                    f"{path}: object {values.max()}, the first map ends with {maps[0].max()}"
                )
            maps.append(values)
        if not maps[0].any():
            raise SourceError(f"{self.annotation(self.frames(video)[0])}: no object to follow")
        return np.stack(maps)


def image_size(path: Path) -> tuple[int, int]:
    """Width and height. Raises SourceError naming the file."""
    try:
        with Image.open(path) as image:
            return image.size
    except OSError as error:
        raise SourceError(f"{path}: not a readable image ({error})") from error


def read_frame(
    path: Path, size: tuple[int, int], mean: tuple[float, ...], std: tuple[float, ...]
) -> Tensor:
    """Normalised frame (3, *size), resized bilinearly without antialias (OpenCV's way). Raises DecodeError."""
    pixels = (
        torch.from_numpy(np.array(decode_rgb(path.read_bytes(), str(path))))
        .permute(2, 0, 1)[None]
        .float()
    )
    resized = torch.nn.functional.interpolate(
        pixels, size=size, mode="bilinear", align_corners=False
    )[0]
    return normalize_pixels(resized.round(), mean, std)


def one_hot_patches(mask: np.ndarray, grid: tuple[int, int], num_objects: int) -> Tensor:
    """Labels (P, 1 + O), 0 or 1, of a map (H, W): the nearest pixel of every patch, background first."""
    small = Image.fromarray(mask).resize((grid[1], grid[0]), Image.Resampling.NEAREST)
    labels = torch.from_numpy(np.array(small)).long().flatten()
    return torch.nn.functional.one_hot(labels, num_objects + 1).float()


def resize_map(labels: Tensor, height: int, width: int) -> np.ndarray:
    """A map (h, w), uint8, at the size of the video, nearest."""
    image = Image.fromarray(labels.cpu().numpy())
    return np.asarray(image.resize((width, height), Image.Resampling.NEAREST))


def check_videos(
    videos: VideoFolder, num_videos: int, num_frames: int, *, threads: int, report: ProgressCallback
) -> None:
    """Read every frame and map; `report` is told how many of how many videos are done.

    SourceError where the split holds another number of videos or frames than the data set should have, or names files.
    """
    found = {"videos": len(videos), "frames": videos.num_frames()}
    wanted = {"videos": num_videos, "frames": num_frames}
    problems = [
        f"{found[w]} {w} found, {wanted[w]} expected" for w in found if found[w] != wanted[w]
    ]
    if problems:
        raise SourceError(f"{videos.root}: {', '.join(problems)}")
    lines = with_progress(
        map_prefetched(videos.problem, range(len(videos)), threads), len(videos), report
    )
    if problems := [line for line in lines if line]:
        raise SourceError(f"{len(problems)} problems: {format_names(problems)}")
