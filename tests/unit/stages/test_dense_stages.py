"""The stages of detection, segmentation, video and attention maps end to end, on a tiny network."""

from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

from mugs.data.mini.coco import materialize_coco
from mugs.data.mini.scenes_and_videos import materialize_scenes, materialize_videos
from mugs.data.sources.base import SourceError
from mugs.models.config import ViTConfig
from mugs.models.vit import build_vit
from mugs.transfer.segmentation.config import SceneRecipe
from mugs.weights.backbone_file import write_backbone_file
from pipeline.manifest import ManifestEntry, Output, hash_path
from pipeline.reading import validate_model
from pipeline.spec import StageConfig
from pipeline.stage import StageContext, StageOutput
from stages import (
    ade20k_data,
    ade20k_segmentation,
    attention,
    coco_data,
    coco_detection,
    davis_data,
    davis_segmentation,
)
from stages.ade20k_data import Ade20kDataConfig
from stages.ade20k_segmentation import Ade20kSegmentationConfig
from stages.attention import AttentionConfig
from stages.coco_data import CocoDataConfig
from stages.coco_detection import CocoDetectionConfig
from stages.davis_data import DavisDataConfig
from stages.davis_segmentation import DavisSegmentationConfig
from stages.shared.external_data import check_external_data

TINY = ViTConfig(embed_dim=16, depth=2, num_heads=2, patch_size=8, image_size=32)
SCENES = SceneRecipe(long_side=128, short_side=32, crop=32, window=32, stride=21)
DETECTION = {
    "detector": {
        "image_size": (64, 64),
        "width": 8,
        "fc_width": 16,
        "head_convs": 1,
        "rpn_samples": 32,
        "roi_samples": 16,
        "proposals_train": 40,
        "proposals_test": 20,
        "score_threshold": 0.01,
    },
    "scales": {"short_sides": (48,), "max_side": 64, "crop_prob": 0.0, "test_short_side": 48},
    "epochs": 1,
    "batch_size": 2,
    "micro_batch_size": 2,
    "precision": "fp32",
    "threads": 1,
    "num_pictures": 2,
}

COCO_DATA = CocoDataConfig(
    dataset="sklearn_digits",
    num_train_images=6,
    num_val_images=3,
    data_dir="builtin:digit_scenes",
    threads=1,
)
SCENE_DATA = Ade20kDataConfig(
    dataset="sklearn_digits_scenes",
    num_classes=11,
    num_train_images=6,
    num_val_images=3,
    data_dir="builtin:digit_scenes",
    threads=1,
)
VIDEO_DATA = DavisDataConfig(
    dataset="sklearn_digits_videos",
    num_videos=2,
    num_frames=8,
    data_dir="builtin:digit_videos",
    threads=1,
)


def entry(
    root: Path, stage: str, outputs: dict[str, Path], info: dict[str, object]
) -> ManifestEntry:
    files = {
        n: Output(path=str(p.relative_to(root)), size=1, sha256=hash_path(p))
        for n, p in outputs.items()
    }
    return ManifestEntry(stage=stage, name=stage, run_id="aaa", outputs=files, info=info).at(root)


@pytest.fixture
def context(tmp_path: Path) -> StageContext:
    """A run with a tiny backbone, and no data yet."""
    torch.manual_seed(0)
    path = tmp_path / "teacher.safetensors"
    write_backbone_file(
        path, build_vit(TINY).state_dict(), {"arch": asdict(TINY), "weights": "teacher"}
    )
    info = {
        "method": "mugs",
        "arch": "vit_tiny",
        "epochs": 3,
        "seed": 5,
        "dataset": "sklearn_digits",
    }
    run_dir = tmp_path / "run"
    run_dir.mkdir()
    return StageContext(
        "a stage",
        "name",
        "bbb",
        run_dir,
        {"weights": entry(tmp_path, "pretrain", {"teacher": path, "initial": path}, info)},
        1,
    )


def with_data(context: StageContext, stage: Any, cfg: StageConfig) -> StageContext:
    """The run with the data that another stage has checked."""
    root = context.run_dir.parent
    folder = root / "data"
    folder.mkdir()
    out = stage.run(replace(context, run_dir=folder), cfg)
    data = entry(root, "data", dict(out.outputs), dict(out.info))
    return replace(context, inputs={**context.inputs, "data": data})


@pytest.fixture
def scenes(context: StageContext) -> StageContext:
    return with_data(context, ade20k_data, SCENE_DATA)


def segmentation(**changes: object) -> Ade20kSegmentationConfig:
    options = {
        "scenes": SCENES,
        "steps": 3,
        "batch_size": 4,
        "precision": "fp32",
        "workers": 0,
        "num_pictures": 2,
    }
    return Ade20kSegmentationConfig(**options | changes)


def check(
    out: StageOutput, run_dir: Path, metrics: list[str], dataset: str, method: str = "mugs"
) -> None:
    assert [row.metric for row in out.rows] == metrics
    for row in out.rows:
        assert (row.run_id, row.method, row.arch, row.epochs, row.seed) == (
            "bbb",
            method,
            "vit_tiny",
            3,
            5,
        )
        assert row.dataset == dataset and row.unit == "%" and 0 <= row.value <= 100
    for path in out.outputs.values():
        assert path.exists() and path.is_relative_to(run_dir)


def test_detection(context: StageContext, meetings: list[set[Path]]) -> None:
    """Rows, files and pictures; and again from the last checkpoint, as after a preemption during
    the test.
    """
    context = with_data(context, coco_data, COCO_DATA)
    assert context.inputs["data"].info == {"dataset": "sklearn_digits", "num_classes": 10}
    out, again = (
        coco_detection.run(
            context,
            validate_model(CocoDetectionConfig, {**DETECTION, "weights": weights}, "x.yaml"),
        )
        for weights in ("teacher", "initial")
    )
    metrics = [
        f"{kind} AP{threshold}" for kind in ("box", "mask") for threshold in ("", "50", "75")
    ]
    check(out, context.run_dir, metrics, "sklearn_digits")
    assert {row.setting for row in out.rows} == {"1 epochs, lr=0.0002, layer decay=0.8"}
    assert out.rows == [replace(row, method="mugs") for row in again.rows]
    check(again, context.run_dir, metrics, "sklearn_digits", "mugs (initialisation)")
    assert set(out.outputs) == {"detector", "detections", "pictures"}
    before, after = meetings[2:4]  # the first two are of the tables of annotations
    assert context.run_dir / "detections" / "part_0000_of_0001.json" in before
    assert out.outputs["detections"] not in before and set(out.outputs.values()) <= after
    assert len(list(out.outputs["pictures"].iterdir())) == 2
    assert "as many detections as" in out.info["captions"]["pictures"]


def test_mask_rcnn(context: StageContext) -> None:
    """Its rows say so, and those of the cascade do not: tables tell them apart."""
    detector = {**DETECTION["detector"], "heads": "mask_rcnn", "normed": True}
    config = {**DETECTION, "detector": detector, "decay": "all_but_norms", "num_pictures": 0}
    out = coco_detection.run(
        with_data(context, coco_data, COCO_DATA), validate_model(CocoDetectionConfig, config, "x")
    )
    assert {row.setting for row in out.rows} == {"mask_rcnn, 1 epochs, lr=0.0002, layer decay=0.8"}


@pytest.mark.parametrize("variant", ["upernet", "linear", "semantic_fpn"])
def test_segmentation(scenes: StageContext, variant: str, meetings: list[set[Path]]) -> None:
    out = ade20k_segmentation.run(scenes, segmentation(variant=variant))
    check(out, scenes.run_dir, ["mIoU", "mAcc", "aAcc"], "sklearn_digits_scenes")
    assert set(out.outputs.values()) <= meetings[-1]
    assert out.rows[0].setting.startswith(f"{variant}, lr=3e-05")
    pictures = sorted(p.name for p in out.outputs["pictures"].iterdir())
    assert pictures == ["validation_0000.png", "validation_0001.png"]
    colours = out.info["colours"]["pictures"]
    assert (
        colours["ground"] == "#800000"
        and len(colours) == 11
        and "the annotation" in out.info["captions"]["pictures"]
    )


def test_a_finished_training_is_not_repeated(scenes: StageContext) -> None:
    """As after a preemption during the test: the last checkpoint is taken,
    and the same rows come out.
    """
    rows, again = (
        ade20k_segmentation.run(scenes, segmentation(weights=weights)).rows
        for weights in ("teacher", "initial")
    )
    assert [row.method for row in again] == ["mugs (initialisation)"] * 3
    assert rows == [replace(row, method="mugs") for row in again]


def test_wrong_coco_is_named(context: StageContext, tmp_path: Path) -> None:
    with pytest.raises(
        SourceError, match=r"train: .*train2017: not there.*; val: .*val2017: not there"
    ):
        coco_data.run(context, CocoDataConfig(data_dir=str(tmp_path)))
    materialize_coco(tmp_path / "mine", train=6, val=3)
    with pytest.raises(SourceError, match=r"10 categories, 80 expected.*6 images, 118287 expected"):
        coco_data.run(context, CocoDataConfig(data_dir=str(tmp_path / "mine")))


@pytest.mark.parametrize(
    ("stage", "mine", "words"),
    [
        (coco_data, COCO_DATA, "6 train images, 3 val images, 10 categories"),
        (ade20k_data, SCENE_DATA, "6 train images, 3 val images"),
        (davis_data, VIDEO_DATA, "2 videos, 8 frames"),
    ],
)
def test_data_is_looked_at_before_a_run(
    context: StageContext, tmp_path: Path, stage: Any, mine: StageConfig, words: str
) -> None:
    """The built-in data set is not written for that; the user's is read as by a run."""
    found, size = check_external_data(mine, {})
    assert "the digits that come with scikit-learn" in found and size == 0
    assert not list(context.run_dir.iterdir())
    out = stage.run(context, mine)
    root = next(path for name, path in out.outputs.items() if name != "layout")
    assert check_external_data(replace(mine, data_dir=str(root)), {}) == (words, 0)
    with pytest.raises(SourceError):
        check_external_data(replace(mine, data_dir=str(tmp_path)), {})


def test_wrong_scenes_are_named(context: StageContext, tmp_path: Path) -> None:
    with pytest.raises(SourceError, match=r"images/training: not a folder"):
        ade20k_data.run(context, Ade20kDataConfig(data_dir=str(tmp_path)))
    root = tmp_path / "mine"
    materialize_scenes(root, train=6, val=3, classes=3)
    mine = replace(SCENE_DATA, data_dir=str(root))
    ade20k_data.run(context, mine)
    with pytest.raises(SourceError, match=r"images/training: 6 images found, 20210 expected"):
        ade20k_data.run(context, replace(mine, num_train_images=20210))
    with pytest.raises(SourceError, match=r"\.png: label 3 among 3 classes"):
        ade20k_data.run(context, replace(mine, num_classes=3))
    Image.new("L", (9, 9)).save(root / "annotations" / "validation" / "validation_0001.png")
    (root / "images" / "training" / "training_0004.jpg").write_bytes(b"")
    with pytest.raises(
        SourceError, match=r"2 problems: .*training_0004\.jpg: .*validation_0001\.png: 9 x 9 pixels"
    ):
        ade20k_data.run(context, mine)


def test_wrong_videos_are_named(context: StageContext, tmp_path: Path) -> None:
    with pytest.raises(SourceError, match=r"ImageSets/2017/val\.txt: no such file"):
        davis_data.run(context, DavisDataConfig(data_dir=str(tmp_path)))
    root = tmp_path / "mine"
    materialize_videos(root, videos=2, frames=4)
    mine = replace(VIDEO_DATA, data_dir=str(root))
    davis_data.run(context, mine)
    with pytest.raises(
        SourceError, match=r"2 videos found, 30 expected, 8 frames found, 1999 expected"
    ):
        davis_data.run(context, DavisDataConfig(data_dir=str(root)))
    Image.new("L", (96, 64)).save(root / "Annotations" / "480p" / "digits_01" / "00000.png")
    with pytest.raises(SourceError, match=r"digits_01/00000\.png: no object to follow"):
        davis_data.run(context, mine)


def test_a_crop_that_patches_do_not_fill(scenes: StageContext) -> None:
    with pytest.raises(
        ValueError, match=r"scenes\.crop 36: expected a multiple of the patch size 8"
    ):
        ade20k_segmentation.run(scenes, segmentation(scenes=replace(SCENES, crop=36)))


def test_video(context: StageContext, meetings: list[set[Path]]) -> None:
    cfg = DavisSegmentationConfig(
        num_previous=(1, 2),
        radius=2,
        short_side=64,
        multiple=8,
        num_pictures=1,
        weights="initial",
    )
    out = davis_segmentation.run(with_data(context, davis_data, VIDEO_DATA), cfg)
    metrics = ["J&F", "J", "F"] * 2
    check(out, context.run_dir, metrics, "sklearn_digits_videos", "mugs (initialisation)")
    assert [row.setting for row in out.rows] == ["n=1"] * 3 + ["n=2"] * 3
    for previous, met in zip((1, 2), meetings, strict=True):
        assert set(out.outputs[f"masks_{previous}"].rglob("*.png")) <= met
    assert len(list(out.outputs["masks_2"].rglob("*.png"))) == 8
    assert [p.name for p in out.outputs["pictures_n=1"].iterdir()] == ["digits_00.png"]
    captions = out.info["captions"]
    assert (
        set(captions) == {"pictures_n=1", "pictures_n=2"}
        and "2 frames before it" in captions["pictures_n=2"]
    )


@pytest.fixture
def pictures(context: StageContext, tmp_path: Path) -> StageContext:
    """The run with five validation images."""
    (tmp_path / "val/a").mkdir(parents=True)
    for index in range(5):
        Image.new("RGB", (30, 24), (50 * index, 0, 0)).save(tmp_path / f"val/a/{index}.png")
    data = entry(tmp_path, "data", {"val": tmp_path / "val"}, {"dataset": "reds", "num_classes": 1})
    return replace(context, inputs={**context.inputs, "data": data})


def test_pictures_of_images_spread_over_the_data_set(
    pictures: StageContext, meetings: list[set[Path]]
) -> None:
    out = attention.run(pictures, AttentionConfig(resize=16, crop=16, num_images=2))
    names = sorted(path.name for path in out.outputs["pictures"].iterdir())
    assert names == ["image_000000.png", "image_000002.png"] and not out.rows
    assert out.info["dataset"] == "reds" and out.info["weights"] == "teacher"
    assert set(out.outputs["pictures"].iterdir()) <= meetings[-1]
    caption = out.info["captions"]["pictures"]
    assert "60% of a head's attention" in caption and "2 heads" in caption
    attention.run(pictures, AttentionConfig(resize=16, crop=16, images=(4,)))
    assert (pictures.run_dir / "pictures/image_000004.png").exists()


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"num_images": 6}, "num_images 6: the data set has 5 validation images"),
        ({"images": (0, 5)}, "images 5: the data set has validation images 0 to 4"),
        ({"crop": 12}, "crop 12: expected a multiple of the patch size 8"),
    ],
)
def test_pictures_that_cannot_be_drawn_are_refused(
    pictures: StageContext, fields: dict[str, object], words: str
) -> None:
    with pytest.raises(ValueError, match=words):
        attention.run(
            pictures,
            validate_model(AttentionConfig, {"resize": 16, "crop": 16, **fields}, "x.yaml"),
        )


def test_a_data_set_without_validation_images(pictures: StageContext) -> None:
    del pictures.inputs["data"].outputs["val"]
    with pytest.raises(ValueError, match="'reds' has no validation images"):
        attention.run(pictures, AttentionConfig())
