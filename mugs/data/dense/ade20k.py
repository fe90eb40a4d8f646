"""Images with label maps: ADE20K's layout, checked and read.

    <root>/images/training/*.jpg        <root>/annotations/training/*.png
    <root>/images/validation/*.jpg      <root>/annotations/validation/*.png
An annotation is an 8-bit map of the image's size. With `reduce_zero` (ADE20K) 0 is void and class 0 is written as 1.
"""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from mugs.data.dense.label_maps import VOID, check_map_size, read_map
from mugs.data.prefetch import ProgressCallback, map_prefetched, with_progress
from mugs.data.sources.base import SourceError, format_names
from mugs.data.sources.decode import DecodeError, decode_rgb

SPLITS = {"train": "training", "val": "validation"}


class SceneFolder:
    """One split. Raises SourceError where folders are missing or images and annotations do not pair up."""

    def __init__(
        self, root: Path, split: str, *, num_classes: int, reduce_zero: bool = True
    ) -> None:
        self.images, self.annotations = (
            root / kind / SPLITS[split] for kind in ("images", "annotations")
        )
        self.num_classes, self.reduce_zero = num_classes, reduce_zero
        for folder in (self.images, self.annotations):
            if not folder.is_dir():
                raise SourceError(
                    f"{folder}: not a folder (expected <root>/images/{SPLITS[split]}/*.jpg and "
                    f"<root>/annotations/{SPLITS[split]}/*.png)"
                )
        self.names = sorted(p.stem for p in self.images.glob("*.jpg"))
        annotated = {p.stem for p in self.annotations.glob("*.png")}
        problems = [
            _listed("images without annotation", sorted(set(self.names) - annotated)),
            _listed("annotations without image", sorted(annotated - set(self.names))),
        ]
        if not self.names:
            problems.insert(0, f"no *.jpg in {self.images}")
        if any(problems):
            raise SourceError(f"{root}, {split}: {'; '.join(filter(None, problems))}")

    def __len__(self) -> int:
        return len(self.names)

    def read(self, index: int) -> tuple[Tensor, Tensor]:
        """Image uint8 (3, H, W) and label map uint8 (H, W), void is 255.

        Raises DecodeError and SourceError naming the file.
        """
        image = self._image(index)
        labels = self._labels(index)
        if differ := check_map_size(labels.shape, (image.shape[2], image.shape[1])):
            raise SourceError(f"{self.annotations / self.names[index]}.png: {differ}")
        return image, labels

    def problem(self, index: int) -> str | None:
        """Why a scene cannot be used, naming the file, or None."""
        try:
            self.read(index)
        except (SourceError, DecodeError, OSError) as error:
            return str(error)
        return None

    def _image(self, index: int) -> Tensor:
        path = self.images / f"{self.names[index]}.jpg"
        return torch.from_numpy(np.array(decode_rgb(path.read_bytes(), str(path)))).permute(2, 0, 1)

    def _labels(self, index: int) -> Tensor:
        path = self.annotations / f"{self.names[index]}.png"
        values = read_map(path)
        if self.reduce_zero:
            values = np.where((values == 0) | (values == VOID), VOID, values - 1).astype(np.uint8)
        known = values[values != VOID]
        if known.size and int(known.max()) >= self.num_classes:
            raise SourceError(
                f"{path}: label {int(known.max())} among {self.num_classes} classes, counted from 0"
            )
        return torch.from_numpy(values)


def check_scenes(
    root: Path,
    counts: dict[str, int],
    *,
    num_classes: int,
    reduce_zero: bool,
    threads: int,
    report: ProgressCallback,
) -> None:
    """Read every scene of the splits that `counts` names; `report` is told how many of how many are done.

    SourceError, in one line, where a split holds another number of images, or files are bad.
    """
    folders = {
        s: SceneFolder(root, s, num_classes=num_classes, reduce_zero=reduce_zero) for s in counts
    }
    problems = [
        f"{folder.images}: {len(folder)} images found, {counts[split]} expected"
        for split, folder in folders.items()
        if len(folder) != counts[split]
    ]
    if not problems:
        places = [(folder, index) for folder in folders.values() for index in range(len(folder))]
        lines = map_prefetched(lambda place: place[0].problem(place[1]), places, threads)
        problems = [line for line in with_progress(lines, len(places), report) if line]
    if problems:
        raise SourceError(_listed("problems", problems))


def _listed(what: str, names: Sequence[str]) -> str:
    return f"{len(names)} {what}: {format_names(names)}" if names else ""
