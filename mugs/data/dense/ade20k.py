"""Images with label maps in the layouts of ADE20K and PASCAL VOC: checked and read.

ADE20K:

    <root>/images/training/*.jpg        <root>/annotations/training/*.png
    <root>/images/validation/*.jpg      <root>/annotations/validation/*.png

PASCAL VOC (`VOCdevkit/VOC2012`), whose lists name the files of a split without their suffix:

    <root>/JPEGImages/*.jpg             <root>/SegmentationClass/*.png
    <root>/ImageSets/Segmentation/train.txt, val.txt

An annotation is an 8-bit map of the image's size. With `reduce_zero` (ADE20K) 0 is void and class 0
is written as 1.
"""

from collections import Counter
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from mugs.data.dense.label_maps import (
    VOID,
    check_items,
    check_map_size,
    raise_problems,
    read_map,
)
from mugs.data.dense.read_image import read_rgb_tensor
from mugs.data.prefetch import ProgressCallback
from mugs.data.sources.base import SourceError, format_names, list_by_suffix

SPLITS = {"train": "training", "val": "validation"}
Layout = Literal["ade20k", "voc"]


class SceneFolder:
    """One split. Raises SourceError unless its images and annotations are there and pair up."""

    def __init__(
        self,
        root: Path,
        split: str,
        *,
        num_classes: int,
        reduce_zero: bool = True,
        layout: Layout = "ade20k",
    ) -> None:
        listed: list[str] | None = None
        if layout == "voc":
            self.images = root / "JPEGImages"
            self.annotations = root / "SegmentationClass"
            expected = "<root>/JPEGImages/*.jpg and <root>/SegmentationClass/*.png"
            listed = read_split_list(root / "ImageSets" / "Segmentation" / f"{split}.txt")
        else:
            self.images = root / "images" / SPLITS[split]
            self.annotations = root / "annotations" / SPLITS[split]
            expected = f"<root>/images/{SPLITS[split]}/*.jpg and "
            expected += f"<root>/annotations/{SPLITS[split]}/*.png"
        self.num_classes = num_classes
        self.reduce_zero = reduce_zero
        self.noted: set[int] = set()
        for folder in (self.images, self.annotations):
            if not folder.is_dir():
                raise SourceError(f"{folder}: not a folder (expected {expected})")
        # An image and its map have the same name, apart from the suffix.
        images = {p.stem for p in list_by_suffix(self.images, ".jpg")}
        annotated = {p.stem for p in list_by_suffix(self.annotations, ".png")}
        # The folders of PASCAL VOC hold all splits, and images of other tasks.
        self.names = sorted(images if listed is None else listed)
        unused = annotated - images if listed is None else set()
        problems = [] if self.names else [f"no *.jpg in {self.images}"]
        problems += [
            f"{len(names)} {what}: {format_names(sorted(names))}"
            for what, names in (
                ("images that are listed and not there", set(self.names) - images),
                ("images without annotation", set(self.names) - annotated),
                ("annotations without image", unused),
            )
            if names
        ]
        if problems:
            raise SourceError(f"{root}, {split}: {'; '.join(problems)}")

    def __len__(self) -> int:
        return len(self.names)

    def read(self, index: int) -> tuple[Tensor, Tensor]:
        """Return the image, uint8 (3, H, W), and its label map, uint8 (H, W), in which void is 255.

        Raises DecodeError and SourceError naming the file.
        """
        image = read_rgb_tensor(self.images / f"{self.names[index]}.jpg")
        path = self.annotations / f"{self.names[index]}.png"
        labels = self._read_labels(path)
        check_map_size(path, labels.shape, (image.shape[2], image.shape[1]))
        return image, labels

    def _note_numbers(self, values: np.ndarray) -> None:
        """Remember which numbers the files hold that tell whether 0 was removed before."""
        telling = (0, self.num_classes - 1, self.num_classes, VOID)
        self.noted |= {number for number in telling if (values == number).any()}

    @property
    def seems_reduced(self) -> bool:
        """Return whether the maps read so far run from 0 to the last class, void being 255.

        Maps from 1 on would hold the number of classes, and mark void by 0.
        """
        return self.reduce_zero and self.noted == {0, self.num_classes - 1, VOID}

    def _read_labels(self, path: Path) -> Tensor:
        values = read_map(path)
        if self.reduce_zero:
            self._note_numbers(values)
            # Void is tested first: 0 - 1 would wrap around to 255 as well, but 255 - 1 would be a
            # class.
            values = np.where((values == 0) | (values == VOID), VOID, values - 1).astype(np.uint8)
        known = values[values != VOID]
        if known.size and int(known.max()) >= self.num_classes:
            raise SourceError(
                f"{path}: label {int(known.max())} among {self.num_classes} classes, counted from 0"
            )
        return torch.from_numpy(values)


def read_split_list(path: Path) -> list[str]:
    """Return the names that a list of PASCAL VOC holds, one a line.

    Raises SourceError if it cannot be read, is empty, or has a name twice.
    """
    try:
        names = path.read_text(encoding="utf-8").split()
    except (OSError, UnicodeDecodeError) as error:
        raise SourceError(f"{path}: not a readable list of images ({error})") from error
    repeated = sorted(name for name, count in Counter(names).items() if count > 1)
    if repeated or not names:
        what = f"listed twice: {format_names(repeated)}" if repeated else "it names no image"
        raise SourceError(f"{path}: {what}")
    return names


def check_scenes(
    root: Path,
    counts: dict[str, int],
    *,
    num_classes: int,
    reduce_zero: bool,
    layout: Layout = "ade20k",
    threads: int,
    report: ProgressCallback,
) -> None:
    """Read every scene of the splits that `counts` names.

    Raises SourceError, in one line, if a split holds another number of images or files are bad.
    """
    folders = {
        split: SceneFolder(
            root, split, num_classes=num_classes, reduce_zero=reduce_zero, layout=layout
        )
        for split in counts
    }
    raise_problems(
        [
            f"{folder.images}: {len(folder)} images found, {counts[split]} expected"
            for split, folder in folders.items()
            if len(folder) != counts[split]
        ]
    )
    # Reading takes minutes, so it waits until the counts are right.
    places = [(folder, index) for folder in folders.values() for index in range(len(folder))]
    check_items(lambda place: place[0].read(place[1]), places, threads, report)
    raise_problems(
        [
            f"{folder.annotations}: labels run from 0 to {num_classes - 1} with {VOID} for void, "
            f"none is {num_classes}: 0 was removed already, and removing it again would move "
            "every class; set reduce_zero: false"
            for folder in folders.values()
            if folder.seems_reduced
        ]
    )
