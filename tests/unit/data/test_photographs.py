"""Patches of the bundled photographs: cut as said, in both splits, and converted by name."""

from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

from mugs.data.mini.photographs import COLUMNS, ROWS, SIDE, cut_patches
from mugs.data.sources.open import open_source
from stages.convert import run
from stages.shared.image_data import ConvertConfig, find_image_folder

BUILTIN = "builtin:sklearn_photo_patches"


def test_no_pixel_is_in_two_patches_and_each_is_of_its_region() -> None:
    height, width = 100, 190
    pixels = np.arange(height * width * 3).reshape(height, width, 3)
    patches = list(cut_patches("photo", pixels))
    assert {patch.shape for _, patch in patches} == {(SIDE, SIDE, 3)}
    first = np.concatenate([patch[..., 0].ravel() for _, patch in patches])
    assert len(np.unique(first)) == len(first) == ROWS * COLUMNS * 2 * 2 * SIDE * SIDE
    for name, patch in patches:
        rows, columns = (patch[..., 0] // 3) // width, (patch[..., 0] // 3) % width
        regions = {
            f"photo_row{r}_column{c}"
            for r, c in zip(rows.ravel() // 50, columns.ravel() // 63, strict=True)
        }
        assert regions == {name}


def test_the_stage_writes_and_converts_them(tmp_path: Path) -> None:
    cfg = ConvertConfig(
        dataset="sklearn_photo_patches",
        num_classes=ROWS * COLUMNS * 2,
        num_train_images=614,
        num_val_images=154,
        train_dir=BUILTIN,
        val_dir=BUILTIN,
    )
    out = run(SimpleNamespace(run_dir=tmp_path), cfg)  # type: ignore[arg-type]
    assert out.info == {"dataset": "sklearn_photo_patches", "num_classes": 12}
    for split, least in (("train", 51), ("val", 12)):
        source = open_source(out.outputs[split])
        counts = np.bincount([source.label(i) for i in range(len(source))])
        assert len(counts) == 12 and counts.min() == least and counts.max() == least + 1


def test_other_built_in_images_are_refused(tmp_path: Path) -> None:
    with pytest.raises(
        ValueError,
        match=r"train_dir: there is no builtin:sklearn_digit \(valid: builtin:sklearn_dig",
    ):
        find_image_folder("builtin:sklearn_digit", "train", tmp_path)
