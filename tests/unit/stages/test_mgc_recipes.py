"""MGC's recipes say what the release trained with, and views that it cannot use are refused."""

from dataclasses import replace

import numpy as np
import pytest

from mugs.data.views.plan import plan_views
from mugs.methods.annotations import annotate_geometry
from mugs.methods.config import MgcConfig
from mugs.pretrain.train import build_pretrain_schedule
from pipeline import config
from pipeline.identity import dump_settings
from pipeline.plan import build_plan
from results.runs import flatten_config
from stages import STAGES
from stages.pretrain import PretrainConfig


@pytest.fixture(scope="module")
def pretraining() -> PretrainConfig:
    runs = build_plan(config.load_reproduction("mgc_vit_s16_coco_ep800", STAGES))
    (found,) = [run.config for run in runs if run.name == "pretrain"]
    return found


def test_the_run_on_coco_is_the_released_one(pretraining: PretrainConfig) -> None:
    assert pretraining.steps_per_epoch == 462
    assert pretraining.mgc == MgcConfig()
    assert pretraining.decay == "all"
    schedule = build_pretrain_schedule(pretraining, 462)
    assert schedule.total_steps == 369_600
    assert [schedule.lr(step) for step in (0, 4619, 4620)] == pytest.approx([0, 1e-3, 1e-3])
    assert schedule.lr(369_599) == pytest.approx(1.0000000185e-6, rel=1e-9)
    assert schedule.teacher_momentum(184_800) == pytest.approx(0.998)
    assert {schedule.wd(step) for step in (0, 1000, 369_599)} == {0.05}


@pytest.mark.parametrize("views", [{"large_crops": "own"}, {"num_small": 2}])
def test_views_it_cannot_use_are_refused(
    pretraining: PretrainConfig, views: dict[str, object]
) -> None:
    with pytest.raises(ValueError, match="set them to shared and 0"):
        replace(pretraining, views=replace(pretraining.views, **views))


def test_the_crops_of_an_image_overlap(pretraining: PretrainConfig) -> None:
    """They fit in the image, their IoU is above 0.2 and 0.5 on the mean; flips are their own."""
    rng = np.random.default_rng(0)
    overlaps = []
    flipped = []
    sizes = [(640, 480), (500, 375), (333, 500), (900, 400), (224, 224)]
    for sample in range(1500):
        width, height = sizes[sample % 5]
        plan = plan_views(0, 0, sample, width, height, pretraining.views)
        geometry = annotate_geometry(rng, plan, 0)
        boxes = geometry["boxes"]
        assert geometry["flips"].tolist() == [crop.flip for crop in plan.crops]
        assert boxes[:, :2].min() >= 0
        assert (boxes[:, :2] + boxes[:, 2:] <= (width, height)).all()
        low, high = boxes[:, :2].max(0), (boxes[:, :2] + boxes[:, 2:]).min(0)
        shared = (high - low).clip(0).prod()
        overlaps.append(shared / (boxes[:, 2:].prod(1).sum() - shared))
        flipped.append(geometry["flips"])
    assert min(overlaps) > 0.2
    assert 0.485 < np.mean(overlaps) < 0.515
    assert np.abs(np.mean(flipped, axis=0) - 0.5).max() < 0.05


# fmt: off
MASK_RCNN = {
    "epochs": 12, "batch_size": 8, "images_per_pass": 1, "decay_epochs": [8, 11], "lr": 7.5e-5,
    "weight_decay": 0.03, "layer_decay": 1.0, "decay": "all_but_norms", "warmup_steps": 1000,
    "warmup_start": 1e-3, "detector.heads": "mask_rcnn", "detector.normed": True,
    "detector.drop_path": 0.0, "detector.image_size": [224, 224], "detector.width": 256,
    "detector.fc_width": 1024, "detector.head_convs": 4, "detector.rpn_samples": 256,
    "detector.roi_samples": 512, "detector.proposals_train": 2000,
    "detector.proposals_train_image": 1000, "detector.proposals_test": 1000,
    "scales.max_side": 1333, "scales.test_short_side": 800,
}
SEMANTIC_FPN = {
    "variant": "semantic_fpn", "steps": 40_000, "batch_size": 16, "lr": 2e-4, "weight_decay": 0.01,
    "layer_decay": 1.0, "decay": "all_but_norms", "warmup_steps": 1500, "drop_path": 0.0,
    "dropout": 0.1, "channels": None, "taps": "2-5-8-11", "scenes.test": "whole",
    "scenes.crop": 512, "scenes.ratio": [0.5, 2.0], "scenes.long_side": 2048,
    "scenes.short_side": 512,
}
# fmt: on


def test_evaluations_by_hand() -> None:
    plan = build_plan(config.load_reproduction("mgc_vit_s16_coco_ep800", STAGES))
    runs = {run.name: run for run in plan}
    for name, expected in {
        "mask_rcnn": MASK_RCNN | {"weights": "teacher"},
        "mask_rcnn_student": MASK_RCNN | {"weights": "student"},
        "semantic_fpn": SEMANTIC_FPN | {"weights": "teacher"},
        "semantic_fpn_student": SEMANTIC_FPN | {"weights": "student"},
        "semantic_fpn_voc": SEMANTIC_FPN,
        "voc": {"layout": "voc", "num_classes": 21, "reduce_zero": False},
    }.items():
        found = flatten_config(dump_settings(runs[name].config))
        assert {key: found[key] for key in expected} == expected, name
    # Images of a GPU: one, and four.
    assert runs["mask_rcnn"].resources.ranks == 8
    assert runs["semantic_fpn"].resources.ranks == 4
