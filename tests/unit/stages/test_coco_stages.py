"""The stages of COCO: options against what they configure, bundled reproductions, and both end to end on digits."""

from dataclasses import asdict, fields, replace
from pathlib import Path

import pytest
import torch

from mugs.backbones.vit import ViTConfig, build_vit
from mugs.data.source import SourceError
from mugs.transfer.detection.config import DetectorConfig
from mugs.transfer.detection.training_config import DetectionConfig
from mugs.transfer.detection.views import Scales
from mugs.weights import save_backbone
from pipeline import config
from pipeline.manifest import ManifestEntry, Output, content_sha256
from pipeline.plan import build_plan
from pipeline.spec import Resources, StageContext
from stages import STAGES, coco_data, coco_detection
from stages.coco_data import CocoDataConfig
from stages.coco_detection import CocoDetectionConfig, DetectorOptions, ScaleOptions, detection_config

TINY = ViTConfig(embed_dim=16, depth=2, num_heads=2, patch_size=8, image_size=32)
SMALL = {
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
    "images_per_pass": 2,
    "precision": "fp32",
    "threads": 1,
    "num_pictures": 2,
}


@pytest.mark.parametrize(
    ("options", "target", "without"),
    [
        (DetectorOptions, DetectorConfig, {"num_classes"}),
        (ScaleOptions, Scales, set()),
        (CocoDetectionConfig, DetectionConfig, {"detector", "scales"}),
    ],
)
def test_names_and_defaults_agree(options: type, target: type, without: set[str]) -> None:
    defaults = {f.name: f.default for f in fields(target) if f.name not in without}
    assert set(defaults) <= set(options.model_fields)
    for name, default in defaults.items():
        assert options.model_fields[name].default == default, name
    if target is not DetectionConfig:
        assert set(options.model_fields) == set(defaults)


@pytest.mark.parametrize(("name", "arch"), [("coco_vit_s16_ep800", "vit_s16"), ("coco_vit_b16_ep400", "vit_b16")])
def test_bundled_reproductions_are_the_released_protocol(name: str, arch: str) -> None:
    """Values written by hand from the recipe; the pretraining is that of the reproduction without COCO."""
    runs = {run.name: run for run in build_plan(config.load(name, STAGES))}
    bare = {run.name: run for run in build_plan(config.load(f"mugs_{arch}_{name[-5:]}", STAGES))}
    assert runs["pretrain"].run_id == bare["pretrain"].run_id and runs["pretrain"].config.arch == arch
    run = detection_config(runs["detection"].config, 80)
    assert (run.epochs, run.batch_size, run.images_per_pass, run.decay_epochs) == (12, 32, 4, (8, 11))
    assert (run.lr, run.weight_decay, run.layer_decay, run.warmup_steps, run.warmup_start) == (
        2e-4,
        0.05,
        0.8,
        500,
        1e-3,
    )
    assert (run.detector.num_classes, run.detector.image_size, run.detector.drop_path) == (80, (800, 1008), 0.1)
    assert (run.detector.width, run.detector.fc_width, run.detector.head_convs) == (256, 1024, 4)
    assert (run.detector.rpn_samples, run.detector.roi_samples) == (256, 512)
    assert (run.detector.proposals_train, run.detector.proposals_test) == (2000, 1000)
    assert (run.scales.max_side, run.scales.test_short_side) == (1333, 800)
    assert run.scales.short_sides == (480, 512, 544, 576, 608, 640, 672, 704, 736, 768, 800)
    assert (run.scales.crop_short_sides, run.scales.crop_sides) == ((400, 500, 600), (384, 600))
    assert runs["detection"].resources.gpus == 8 and runs["coco"].resources.gpus == 0


def test_layer_decay_is_an_option_and_makes_a_run_of_its_own() -> None:
    name = "coco_vit_s16_ep800"
    plans = [build_plan(config.load(name, STAGES, [f"detection.layer_decay={d}"])) for d in (0.65, 0.8)]
    ids = [next(run.run_id for run in plan if run.name == "detection") for plan in plans]
    plain = next(run.run_id for run in build_plan(config.load(name, STAGES)) if run.name == "detection")
    assert ids[0] != plain == ids[1]


def test_batches_that_do_not_fit_the_ranks_are_refused_when_planned() -> None:
    cfg = CocoDetectionConfig()
    assert cfg.misfit(Resources(ranks_per_node=8)) is None and cfg.misfit(Resources(ranks_per_node=2)) is None
    assert "2 images to a rank" in str(cfg.misfit(Resources(ranks_per_node=8, nodes=2)))
    assert "32 over 5 ranks" in str(cfg.misfit(Resources(ranks_per_node=5)))


@pytest.fixture
def context(tmp_path: Path) -> StageContext:
    torch.manual_seed(0)
    path = tmp_path / "teacher.safetensors"
    save_backbone(path, build_vit(TINY).state_dict(), {"arch": asdict(TINY)})
    outputs = {"teacher": Output(path=path.name, size=1, sha256=content_sha256(path))}
    info = {"method": "mugs", "arch": "vit_tiny", "epochs": 3, "seed": 5, "dataset": "sklearn_digits"}
    entry = ManifestEntry(stage="pretrain", name="pretrain", run_id="aaa", outputs=outputs, info=info).at(tmp_path)
    return StageContext("coco_detection", "name", "bbb", tmp_path / "run", {"weights": entry}, 1)


def checked_data(context: StageContext, folder: Path) -> ManifestEntry:
    """The entry of a finished coco_data run on digits."""
    cfg = CocoDataConfig(
        dataset="sklearn_digits", num_train_images=6, num_val_images=3, data_dir="builtin:digit_scenes"
    )
    out = coco_data.run(replace(context, stage="coco_data", run_dir=folder), cfg)
    outputs = {n: Output(path=str(p.relative_to(folder)), size=1, sha256="") for n, p in out.outputs.items()}
    return ManifestEntry(stage="coco_data", name="coco", run_id="ccc", outputs=outputs, info=out.info).at(folder)


def test_both_stages_on_digits(context: StageContext, tmp_path: Path) -> None:
    """Rows, files and pictures; and again from the last checkpoint, as after a preemption during the test."""
    data = checked_data(context, tmp_path / "coco")
    assert data.info == {"dataset": "sklearn_digits", "num_classes": 10}
    context = replace(context, inputs={**context.inputs, "data": data})
    out, again = (coco_detection.run(context, CocoDetectionConfig(**SMALL)) for _ in range(2))
    assert [row.metric for row in out.rows] == [f"{k} AP{t}" for k in ("box", "mask") for t in ("", "50", "75")]
    for row in out.rows:
        assert (row.run_id, row.method, row.arch, row.epochs, row.seed) == ("bbb", "mugs", "vit_tiny", 3, 5)
        assert (row.dataset, row.stage, row.setting) == (
            "sklearn_digits",
            "coco_detection",
            "1 epochs, lr=0.0002, layer decay=0.8",
        )
        assert 0 <= row.value <= 100
    assert out.rows == again.rows
    assert set(out.outputs) == {"detector", "detections", "pictures"}
    assert len(list(out.outputs["pictures"].iterdir())) == 2
    assert "score of at least 0.3" in out.info["captions"]["pictures"]


def test_wrong_data_is_named_before_gpus_are_used(context: StageContext, tmp_path: Path) -> None:
    with pytest.raises(SourceError, match=r"train: .*train2017: not there.*; val: .*val2017: not there"):
        coco_data.run(replace(context, run_dir=tmp_path / "x"), CocoDataConfig(data_dir=str(tmp_path)))
    checked_data(context, tmp_path / "coco")
    written = CocoDataConfig(data_dir=str(tmp_path / "coco" / "scenes"))
    with pytest.raises(SourceError, match=r"10 categories, 80 expected.*6 images, 118287 expected"):
        coco_data.run(replace(context, run_dir=tmp_path / "x"), written)
