"""Label maps that do not count as the settings say."""

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from mugs.data.dense.ade20k import check_scenes
from mugs.data.sources.base import SourceError


def check_maps(root: Path, labels: list[int], *, reduce_zero: bool) -> None:
    """Check two scenes of each split whose maps hold these labels, half of them in each."""
    for split in ("training", "validation"):
        for index in range(2):
            values = np.array(labels[index::2] * 8, dtype=np.uint8).reshape(8, -1)
            for kind, suffix in (("images", "jpg"), ("annotations", "png")):
                path = root / kind / split / f"{index}.{suffix}"
                path.parent.mkdir(parents=True, exist_ok=True)
                Image.fromarray(values).save(path)
    check_scenes(
        root,
        {"train": 2, "val": 2},
        num_classes=150,
        reduce_zero=reduce_zero,
        threads=1,
        report=lambda done, total: None,
    )


def test_maps_without_zero_are_not_reduced_again(tmp_path: Path) -> None:
    reduced = [*range(150), 255]
    words = r"2 problems: .*annotations/training: labels run from 0 to 149 .*reduce_zero: false"
    with pytest.raises(SourceError, match=words):
        check_maps(tmp_path, reduced, reduce_zero=True)
    check_maps(tmp_path, reduced, reduce_zero=False)


@pytest.mark.parametrize(
    "labels", [range(151), [*range(151), 255], range(1, 150), [1, 7, 255]], ids=str
)
def test_maps_as_published_are_taken(tmp_path: Path, labels: list[int]) -> None:
    check_maps(tmp_path, list(labels), reduce_zero=True)
