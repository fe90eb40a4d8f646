"""DINO's recipes are its published runs: values written by hand from their table."""

from typing import Any

import pytest

from pipeline import config
from pipeline.identity import dump_settings, run_id, science_fields
from pipeline.plan import build_plan
from pipeline.reading import validate_model
from pipeline.spec import ConfigError
from results.runs import flatten_config
from results.variants import describe_variant
from stages import STAGES
from stages.pretrain import PretrainConfig

# batch, peak and last rate, clipping, temperatures and their warm-up, trained magnitudes, frozen
# epochs, small crops, large and small scale.
WARM = (0.04, 0.07)
PUBLISHED: dict[str, tuple[Any, ...]] = {
    "vit_s16_ep100": (512, 1e-3, 1e-6, 3.0, (0.04, 0.04), 0, False, 1, 8, (0.4, 1), (0.05, 0.4)),
    "vit_s16_ep300": (1024, 2e-3, 1e-6, 3.0, WARM, 30, True, 1, 8, (0.4, 1), (0.05, 0.4)),
    "vit_s16_ep800": (1024, 2e-3, 1e-5, 0.0, WARM, 30, True, 1, 10, (0.25, 1), (0.05, 0.25)),
    "vit_b16_ep400": (1024, 3e-3, 2e-6, 0.3, WARM, 50, False, 3, 10, (0.25, 1), (0.05, 0.25)),
}


def load(name: str, **changes: Any) -> PretrainConfig:
    settings = {**config.load_recipe(f"dino/{name}"), **changes}
    return validate_model(PretrainConfig, {k: v for k, v in settings.items() if k != "stage"}, name)


@pytest.mark.parametrize("name", PUBLISHED)
def test_recipe(name: str) -> None:
    # The batch of the released ViT-B is not known, so its recipe has none.
    cfg = load(name, **({"batch_size": 1024} if "vit_b16" in name else {}))
    dino = cfg.dino
    found = (
        cfg.batch_size,
        cfg.peak_lr,
        cfg.min_lr,
        cfg.clip_at(0),
        dino.teacher_temperature,
        dino.teacher_warmup_epochs,
        dino.train_prototype_magnitude,
        cfg.freeze_prototypes_epochs,
        cfg.views.num_small,
        cfg.views.large_scale,
        cfg.views.small_scale,
    )
    assert found == PUBLISHED[name]
    assert (cfg.arch, cfg.epochs) == (name[:7], int(name.rpartition("ep")[2]))
    assert (cfg.weight_decay, cfg.decay, cfg.warmup_epochs) == ((0.04, 0.4), "matrices", 10)
    assert (cfg.teacher_momentum, cfg.patch_lr_scale, dino.drop_path) == (0.996, 1.0, 0.1)
    assert (dino.num_prototypes, dino.head_hidden, dino.bottleneck) == (65536, 2048, 256)
    assert (dino.student_temperature, dino.center_momentum) == (0.1, 0.9)
    assert (cfg.views.large_crops, cfg.views.num_crops) == ("shared", 2 + cfg.views.num_small)


def test_the_released_vit_b_has_no_batch() -> None:
    with pytest.raises(ConfigError, match="'batch_size' is missing"):
        load("vit_b16_ep400")


def test_variants_of_table_8() -> None:
    runs = {r.name: r.config for r in build_plan(config.load_reproduction("table8", STAGES))}
    usual = {
        r.name: r.config for r in build_plan(config.load_reproduction("dino_vit_s16_ep100", STAGES))
    }

    def variant(settings: Any) -> str:
        return describe_variant(flatten_config(dump_settings(settings)), "vit_s16")

    assert variant(usual["pretrain"]) == ""
    assert variant(runs["dino_weak"]) == variant(runs["weak_augmentation"]) == "weak augmentation"
    assert variant(runs["dino_strong"]) == "strong augmentation"
    assert variant(runs["pretrain"]) == ""
    strong = runs["dino_strong"].views
    assert (strong.num_large, strong.weak_prob) == (4, 0.5)


def test_only_the_chosen_method_is_part_of_the_id() -> None:
    def id_of(**settings: Any) -> str:
        return run_id("pretrain", PretrainConfig(epochs=1, batch_size=1, **settings), {})

    assert id_of() != id_of(method="dino")
    assert "dino" not in science_fields(PretrainConfig(epochs=1, batch_size=1))
    chosen = science_fields(PretrainConfig(epochs=1, batch_size=1, method="dino"))
    assert "mugs" not in chosen
    assert chosen["dino"]["num_prototypes"] == 65536


def test_settings_of_a_method_that_is_not_chosen_are_refused() -> None:
    settings = {"epochs": 1, "batch_size": 1, "dino": {"head_hidden": 16}}
    with pytest.raises(ConfigError, match="dino: settings of a method that is not chosen"):
        validate_model(PretrainConfig, settings, "x.yaml")


def test_former_name_of_shared_crops() -> None:
    settings = {"epochs": 1, "batch_size": 1, "views": {"weak_only": True}}
    cfg = validate_model(PretrainConfig, settings, "x.yaml")
    assert cfg.views.large_crops == "shared"
    assert science_fields(cfg)["views"]["weak_only"] is True
    assert science_fields(PretrainConfig(epochs=1, batch_size=1))["views"]["weak_only"] is False
