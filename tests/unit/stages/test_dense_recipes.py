"""The bundled dense reproductions: values written by hand from the recipe,
on the pretrainings of the bundled runs.
"""

from contextlib import nullcontext

import pytest

from pipeline import config
from pipeline.identity import dump_settings
from pipeline.plan import build_plan, list_unset_settings
from pipeline.reading import validate_model
from pipeline.spec import ConfigError, Resources, StageConfig, StageRun
from results.runs import flatten_config
from stages import STAGES
from stages.ade20k_segmentation import Ade20kSegmentationConfig
from stages.coco_detection import CocoDetectionConfig

SHORT = ("vit_s16_ep800", "vit_b16_ep400")


def planned(name: str, *overrides: str) -> dict[str, StageRun]:
    runs = build_plan(config.load_reproduction(name, STAGES, overrides))
    return {run.name: run for run in runs}


@pytest.mark.parametrize("task", ["coco", "ade20k", "davis"])
@pytest.mark.parametrize("short", SHORT)
def test_the_pretraining_is_that_of_the_main_reproduction(task: str, short: str) -> None:
    mine, theirs = planned(f"{task}_{short}"), planned(f"mugs_{short}")
    assert mine["pretrain"] == theirs["pretrain"] and mine["imagenet"] == theirs["imagenet"]


# fmt: off
ADE20K = {
    "steps": 160_000, "batch_size": 16, "warmup_steps": 1500, "weight_decay": 0.05,
    "channels": None, "test_precision": "fp32", "scenes.long_side": 2048,
    "scenes.short_side": 512, "scenes.ratio": [0.5, 2.0], "scenes.crop": 512,
    "scenes.max_class_share": 0.75, "scenes.flip_prob": 0.5, "scenes.window": 512,
    "scenes.stride": 341,
}
UPERNET = {
    "lr": 3e-5, "layer_decay": 0.9, "drop_path": 0.1, "auxiliary_channels": 256,
    "auxiliary_weight": 0.4, "dropout": 0.1,
}
COCO = {
    "epochs": 12, "batch_size": 32, "images_per_pass": 4, "decay_epochs": [8, 11], "lr": 2e-4,
    "weight_decay": 0.05, "layer_decay": 0.8, "warmup_steps": 500, "warmup_start": 1e-3,
    "test_precision": "fp32",
    "detector.image_size": [800, 1008], "detector.drop_path": 0.1,
    "detector.width": 256, "detector.fc_width": 1024, "detector.head_convs": 4,
    "detector.rpn_samples": 256, "detector.roi_samples": 512, "detector.proposals_train": 2000,
    "detector.proposals_test": 1000, "scales.max_side": 1333, "scales.test_short_side": 800,
    "scales.short_sides": [480, 512, 544, 576, 608, 640, 672, 704, 736, 768, 800],
    "scales.crop_short_sides": [400, 500, 600], "scales.crop_sides": [384, 600],
}
DAVIS = {
    "short_side": 480, "multiple": 64, "num_neighbours": 5, "temperature": 0.1, "radius": 12,
    "num_previous": [7, 20], "ties": "kept",
}
IBOT_COCO = {
    "lr": 1e-4, "layer_decay": 0.65, "detector.drop_path": 0.2, "batch_size": 16,
    "images_per_pass": 2,
}
# fmt: on
LINEAR = {"layer_decay": 1.0, "drop_path": 0.0, "dropout": 0.0}
EXPECTED = {
    "coco_vit_s16_ep800": {"detection": COCO},
    "coco_vit_b16_ep400": {"detection": COCO | IBOT_COCO},
    "ade20k_vit_s16_ep800": {
        "upernet": ADE20K | UPERNET,
        "linear": ADE20K | LINEAR | {"lr": 3e-5},
    },
    "ade20k_vit_b16_ep400": {
        "upernet": ADE20K | UPERNET | {"lr": 7e-4, "layer_decay": 0.65},
        "linear": ADE20K | LINEAR | {"lr": 7e-4},
    },
    "davis_vit_s16_ep800": {"davis": {"num_videos": 30, "num_frames": 1999}, "video": DAVIS},
    "davis_vit_b16_ep400": {"davis": {"num_videos": 30, "num_frames": 1999}, "video": DAVIS},
}
GPUS = {"detection": 8, "coco": 0}


@pytest.mark.parametrize("name", EXPECTED)
def test_settings_by_hand(name: str) -> None:
    runs = planned(name)
    for run, expected in EXPECTED[name].items():
        found = flatten_config(dump_settings(runs[run].config))
        assert {key: found[key] for key in expected} == expected, run
    assert all(runs[run].resources.gpus == gpus for run, gpus in GPUS.items() if run in runs)
    unset = {line.split(" ")[0] for line in list_unset_settings(list(runs.values()))}
    assert f"{name.split('_')[0]}.data_dir" in unset


def test_layer_decay_is_an_option_and_makes_a_run_of_its_own() -> None:
    plain, same, other = (
        planned("coco_vit_s16_ep800", *overrides)["detection"].run_id
        for overrides in ((), ["detection.layer_decay=0.8"], ["detection.layer_decay=0.65"])
    )
    assert plain == same != other


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"layer_decay": 0.9}, r"layer_decay 0\.9 with variant linear, whose ViT is frozen"),
        ({"drop_path": 0.1}, r"drop_path 0\.1 with variant linear"),
        ({"dropout": 0.1}, r"dropout 0\.1 with variant linear, which is one layer"),
        ({"channels": 32}, r"channels 32 with variant linear, which is one layer"),
    ],
)
def test_settings_that_mean_nothing_are_refused(change: dict[str, float], words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        validate_model(Ade20kSegmentationConfig, {"variant": "linear", **change}, "x.yaml")


@pytest.mark.parametrize(
    ("config_class", "ranks", "words"),
    [
        (Ade20kSegmentationConfig, 4, None),
        (Ade20kSegmentationConfig, 3, "batch_size 16"),
        (CocoDetectionConfig, 8, None),
        (CocoDetectionConfig, 2, None),
        (CocoDetectionConfig, 16, "2 images to a rank"),
        (CocoDetectionConfig, 5, "32 over 5 ranks"),
    ],
)
def test_a_batch_that_does_not_divide_is_said_early(
    config_class: type[StageConfig], ranks: int, words: str | None
) -> None:
    with pytest.raises(ValueError, match=words) if words else nullcontext():
        config_class().check_resources(Resources(ranks_per_node=ranks))


def test_plan_says_what_the_annotations_of_coco_take() -> None:
    (line,) = planned("coco_vit_s16_ep800")["detection"].facts
    assert line.startswith("annotations: rank 0 alone parses them (3.4 GiB")
    assert not planned("mini")["detection"].facts
