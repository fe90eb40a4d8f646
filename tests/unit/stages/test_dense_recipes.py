"""The bundled dense reproductions: values written by hand from the recipe,
on the pretrainings of the bundled runs.
"""

from dataclasses import fields

import pytest

from mugs.transfer.segmentation.config import SceneRecipe
from mugs.transfer.video.config import PropagationRecipe
from pipeline import config
from pipeline.plan import build_plan, list_unset_settings
from pipeline.reading import validate_model
from pipeline.spec import ConfigError, Resources, StageRun
from stages import STAGES
from stages.ade20k_segmentation import Ade20kSegmentationConfig
from stages.coco_detection import CocoDetectionConfig

SHORT = ("vit_s16_ep800", "vit_b16_ep400")


def planned(name: str) -> dict[str, StageRun]:
    return {run.name: run for run in build_plan(config.load_reproduction(name, STAGES))}


@pytest.mark.parametrize("task", ["coco", "ade20k", "davis"])
@pytest.mark.parametrize("short", SHORT)
def test_the_pretraining_is_that_of_the_main_reproduction(task: str, short: str) -> None:
    mine, theirs = planned(f"{task}_{short}"), planned(f"mugs_{short}")
    assert mine["pretrain"] == theirs["pretrain"] and mine["imagenet"] == theirs["imagenet"]


@pytest.mark.parametrize("short", SHORT)
def test_ade20k(short: str) -> None:
    runs = planned(f"ade20k_{short}")
    upernet, linear = (runs[name].config for name in ("upernet", "linear"))
    for cfg in (upernet, linear):
        assert (cfg.steps, cfg.batch_size, cfg.warmup_steps, cfg.weight_decay) == (
            160_000,
            16,
            1500,
            0.05,
        )
        assert cfg.scenes == SceneRecipe()
        assert cfg.num_classes == 150 and cfg.dropout == 0.1
    assert (upernet.lr, upernet.layer_decay, runs["upernet"].config.drop_path) == (3e-5, 0.9, 0.1)
    assert (
        upernet.channels,
        upernet.auxiliary_channels,
        upernet.auxiliary_weight,
    ) == (
        None,
        256,
        0.4,
    )
    assert (linear.lr, linear.layer_decay) == (
        {"vit_s16_ep800": 3e-5, "vit_b16_ep400": 7e-4}[short],
        1.0,
    )
    assert runs["linear"].config.drop_path == 0.0
    assert runs["upernet"].resources.gpus == 4
    lines = list_unset_settings(list(runs.values()))
    assert [line.split(" ")[0] for line in lines if "data_dir" in line] == ["ade20k.data_dir"]


def test_scene_recipe() -> None:
    recipe = SceneRecipe()
    assert (recipe.long_side, recipe.short_side, recipe.ratio) == (2048, 512, (0.5, 2.0))
    assert (recipe.crop, recipe.max_class_share, recipe.flip_prob) == (512, 0.75, 0.5)
    assert (recipe.window, recipe.stride) == (512, 341)


@pytest.mark.parametrize("short", SHORT)
def test_coco(short: str) -> None:
    runs = planned(f"coco_{short}")
    run = runs["detection"].config
    assert (run.epochs, run.batch_size, run.micro_batch_size, run.decay_epochs) == (
        12,
        32,
        4,
        (8, 11),
    )
    assert (run.lr, run.weight_decay, run.layer_decay) == (2e-4, 0.05, 0.8)
    assert (run.warmup_steps, run.warmup_start) == (500, 1e-3)
    assert (run.detector.num_classes, run.detector.image_size, run.detector.drop_path) == (
        80,
        (800, 1008),
        0.1,
    )
    assert (run.detector.width, run.detector.fc_width, run.detector.head_convs) == (256, 1024, 4)
    assert (run.detector.rpn_samples, run.detector.roi_samples) == (256, 512)
    assert (run.detector.proposals_train, run.detector.proposals_test) == (2000, 1000)
    assert (run.scales.max_side, run.scales.test_short_side) == (1333, 800)
    assert run.scales.short_sides == (480, 512, 544, 576, 608, 640, 672, 704, 736, 768, 800)
    assert (run.scales.crop_short_sides, run.scales.crop_sides) == ((400, 500, 600), (384, 600))
    assert runs["detection"].resources.gpus == 8 and runs["coco"].resources.gpus == 0


def test_layer_decay_is_an_option_and_makes_a_run_of_its_own() -> None:
    name = "coco_vit_s16_ep800"
    plans = [
        build_plan(config.load_reproduction(name, STAGES, [f"detection.layer_decay={d}"]))
        for d in (0.65, 0.8)
    ]
    ids = [next(run.run_id for run in plan if run.name == "detection") for plan in plans]
    plain = next(
        run.run_id
        for run in build_plan(config.load_reproduction(name, STAGES))
        if run.name == "detection"
    )
    assert ids[0] != plain == ids[1]


@pytest.mark.parametrize("short", SHORT)
def test_davis(short: str) -> None:
    cfg = planned(f"davis_{short}")["video"].config
    data = planned(f"davis_{short}")["davis"].config
    assert (data.num_videos, data.num_frames) == (30, 1999)
    assert cfg.num_previous == (7, 20)
    for setting in fields(PropagationRecipe):
        assert getattr(cfg, setting.name) == setting.default


def test_settings_that_mean_nothing_are_refused() -> None:
    with pytest.raises(
        ConfigError, match=r"layer_decay 0\.9 with variant linear, whose ViT is frozen"
    ):
        validate_model(
            Ade20kSegmentationConfig, {"variant": "linear", "layer_decay": 0.9}, "x.yaml"
        )
    with pytest.raises(ConfigError, match=r"drop_path 0\.1 with variant linear"):
        validate_model(Ade20kSegmentationConfig, {"variant": "linear", "drop_path": 0.1}, "x.yaml")
    with pytest.raises(ConfigError, match=r"channels 32 with variant linear, which is one layer"):
        validate_model(Ade20kSegmentationConfig, {"variant": "linear", "channels": 32}, "x.yaml")
    assert (
        validate_model(Ade20kSegmentationConfig, {"variant": "linear"}, "x.yaml").layer_decay == 1.0
    )


def test_a_batch_that_does_not_divide_is_said_early() -> None:
    scenes = Ade20kSegmentationConfig()
    scenes.check_resources(Resources(ranks_per_node=4))
    with pytest.raises(ValueError, match="batch_size 16"):
        scenes.check_resources(Resources(ranks_per_node=3))
    coco = CocoDetectionConfig()
    for ranks in (8, 2):
        coco.check_resources(Resources(ranks_per_node=ranks))
    with pytest.raises(ValueError, match="2 images to a rank"):
        coco.check_resources(Resources(ranks_per_node=8, nodes=2))
    with pytest.raises(ValueError, match="32 over 5 ranks"):
        coco.check_resources(Resources(ranks_per_node=5))
