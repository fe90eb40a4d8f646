"""The bundled dense reproductions: values written by hand from the recipe, on the pretrainings of the bundled runs."""

from dataclasses import fields

import pytest
from pydantic import ValidationError

from mugs.transfer.segmentation.config import SegmentationConfig
from mugs.transfer.segmentation.model import SegmenterConfig
from mugs.transfer.segmentation.recipe import SceneRecipe
from mugs.transfer.video import PropagationRecipe
from pipeline import config
from pipeline.plan import build_plan, unresolved
from pipeline.spec import Resources, StageRun
from stages import STAGES
from stages.ade20k_segmentation import Ade20kSegmentationConfig, SceneOptions, segmentation_config
from stages.davis_segmentation import DavisSegmentationConfig, propagation_recipe

SHORT = ("vit_s16_ep800", "vit_b16_ep400")


def planned(name: str) -> dict[str, StageRun]:
    return {run.name: run for run in build_plan(config.load(name, STAGES))}


@pytest.mark.parametrize("task", ["ade20k", "davis"])
@pytest.mark.parametrize("short", SHORT)
def test_the_pretraining_is_that_of_the_main_reproduction(task: str, short: str) -> None:
    mine, theirs = planned(f"{task}_{short}"), planned(f"mugs_{short}")
    assert mine["pretrain"] == theirs["pretrain"] and mine["imagenet"] == theirs["imagenet"]


@pytest.mark.parametrize("short", SHORT)
def test_ade20k(short: str) -> None:
    runs = planned(f"ade20k_{short}")
    upernet, linear = (segmentation_config(runs[name].config, 150) for name in ("upernet", "linear"))
    for cfg in (upernet, linear):
        assert (cfg.steps, cfg.batch_size, cfg.warmup_steps, cfg.weight_decay) == (160_000, 16, 1500, 0.05)
        assert cfg.scenes == SceneRecipe()
        assert cfg.model.num_classes == 150 and cfg.model.dropout == 0.1
    assert (upernet.lr, upernet.layer_decay, runs["upernet"].config.drop_path) == (3e-5, 0.9, 0.1)
    assert (upernet.model.channels, upernet.model.auxiliary_channels, upernet.model.auxiliary_weight) == (
        None,
        256,
        0.4,
    )
    assert (linear.lr, linear.layer_decay) == ({"vit_s16_ep800": 3e-5, "vit_b16_ep400": 7e-4}[short], 1.0)
    assert runs["linear"].config.drop_path == 0.0
    assert runs["upernet"].resources.gpus == 4
    lines = unresolved(list(runs.values()))
    assert [line.split(" ")[0] for line in lines if "data_dir" in line] == ["ade20k.data_dir"]


def test_scene_recipe() -> None:
    recipe = SceneRecipe()
    assert (recipe.long_side, recipe.short_side, recipe.ratio) == (2048, 512, (0.5, 2.0))
    assert (recipe.crop, recipe.max_class_share, recipe.flip_prob) == (512, 0.75, 0.5)
    assert (recipe.window, recipe.stride) == (512, 341)


@pytest.mark.parametrize("short", SHORT)
def test_davis(short: str) -> None:
    cfg = planned(f"davis_{short}")["video"].config
    data = planned(f"davis_{short}")["davis"].config
    assert (data.num_videos, data.num_frames) == (30, 1999)
    assert cfg.num_previous == (7, 20)
    assert propagation_recipe(cfg, 7) == PropagationRecipe()


def test_stage_defaults_are_those_of_the_engine() -> None:
    for options, target in ((SceneOptions, SceneRecipe), (DavisSegmentationConfig, PropagationRecipe)):
        for field in fields(target):
            if field.name in options.model_fields and field.name != "num_previous":
                assert options.model_fields[field.name].default == field.default, field.name
    for target in (SegmentationConfig, SegmenterConfig):
        for field in fields(target):
            if field.name in Ade20kSegmentationConfig.model_fields and field.name not in (
                "num_classes",
                "scenes",
                "variant",
            ):
                assert Ade20kSegmentationConfig.model_fields[field.name].default == field.default, field.name


def test_settings_that_mean_nothing_are_refused() -> None:
    with pytest.raises(ValidationError, match=r"layer_decay 0\.9 with variant linear, whose ViT is frozen"):
        Ade20kSegmentationConfig(variant="linear", layer_decay=0.9)
    with pytest.raises(ValidationError, match=r"drop_path 0\.1 with variant linear"):
        Ade20kSegmentationConfig(variant="linear", drop_path=0.1)
    assert Ade20kSegmentationConfig(variant="linear").layer_decay == 1.0


def test_a_batch_that_does_not_divide_is_said_early() -> None:
    assert "batch_size 16" in (Ade20kSegmentationConfig().misfit(Resources(ranks_per_node=3)) or "")
    assert Ade20kSegmentationConfig().misfit(Resources(ranks_per_node=4)) is None
