"""iBOT's recipes are its published runs: values written by hand from their table."""

from typing import Any

import pytest

from pipeline import config
from pipeline.identity import dump_settings
from pipeline.plan import build_plan
from pipeline.reading import validate_model
from pipeline.spec import ConfigError
from results.runs import flatten_config
from results.variants import describe_variant
from stages import STAGES
from stages.pretrain import PretrainConfig

# epochs, peak rate at a batch of 1024, last rate, clipping, epochs of the temperatures' warm-up,
# trained magnitudes, frozen epochs, large and small scale.
SMALL = (2e-3, 1e-6, 3.0, 30, True, 1, (0.25, 1), (0.05, 0.25))
BASE = (3e-3, 2e-6, 0.3, 50, False, 3, (0.32, 1), (0.05, 0.32))
# shape, ratios and half-widths of the masks.
VARYING = ("block", (0, 0.3), (0, 0.2))
RANDOM = ("random", (0, 0.7), (0, 0.05))
PUBLISHED: dict[str, tuple[Any, ...]] = {
    "vit_s16_ep800": (SMALL, VARYING),
    "vit_s16_ep300": (SMALL, VARYING),
    "vit_s16_ep100": (SMALL, ("block", (0, 0.3), (0, 0))),
    "vit_b16_ep400": (BASE, VARYING),
    "vit_b16_ep400_random": (BASE, RANDOM),
    "vit_l16_ep250": (BASE, VARYING),
    "vit_l16_ep250_random": (BASE, RANDOM),
}


def load(name: str, **changes: Any) -> PretrainConfig:
    settings = {**config.load_recipe(f"ibot/{name}"), **changes}
    return validate_model(PretrainConfig, {k: v for k, v in settings.items() if k != "stage"}, name)


@pytest.mark.parametrize("name", PUBLISHED)
def test_recipe(name: str) -> None:
    # The batch of the released ViT-B and ViT-L is not known, so their recipes have none.
    cfg = load(name, **({} if "vit_s16" in name else {"batch_size": 1024}))
    ibot = cfg.ibot
    found = (
        cfg.peak_lr,
        cfg.min_lr,
        cfg.clip_at(0),
        ibot.teacher_warmup_epochs,
        ibot.train_prototype_magnitude,
        cfg.freeze_prototypes_epochs,
        cfg.views.large_scale,
        cfg.views.small_scale,
    )
    assert found == PUBLISHED[name][0]
    assert (ibot.mask_shape, ibot.mask_ratios, ibot.mask_half_widths) == PUBLISHED[name][1]
    assert (cfg.arch, cfg.epochs, cfg.batch_size) == (name[:7], int(name.split("_ep")[1][:3]), 1024)
    assert (cfg.weight_decay, cfg.decay, cfg.warmup_epochs) == ((0.04, 0.4), "matrices", 10)
    assert (cfg.teacher_momentum, cfg.patch_lr_scale, ibot.drop_path) == (0.996, 1.0, 0.1)
    assert ibot.teacher_temperature == ibot.patch_teacher_temperature == (0.04, 0.07)
    assert (ibot.shared_head, ibot.num_prototypes, ibot.head_hidden) == (True, 8192, 2048)
    assert (ibot.student_temperature, ibot.center_momentum) == (0.1, 0.9)
    assert (ibot.loss_weights, ibot.mask_start_epoch) == ((1.0, 1.0), 0)
    assert (cfg.views.large_crops, cfg.views.num_small) == ("shared", 10)


@pytest.mark.parametrize("name", [name for name in PUBLISHED if "vit_s16" not in name])
def test_an_unknown_batch_is_not_made_up(name: str) -> None:
    with pytest.raises(ConfigError, match="batch_size"):
        load(name)


def test_variants_of_table_8() -> None:
    runs = {r.name: r.config for r in build_plan(config.load_reproduction("table8", STAGES))}
    found = {
        name: describe_variant(flatten_config(dump_settings(runs[name])), "vit_s16")
        for name in ("ibot", "ibot_weak", "ibot_strong")
    }
    weak, strong = "weak augmentation", "strong augmentation"
    assert found == {"ibot": "", "ibot_weak": weak, "ibot_strong": strong}
    inputs = {name: runs[name].ibot.clustering_input for name in found}
    assert inputs == {"ibot": "masked", "ibot_weak": "unmasked", "ibot_strong": "unmasked"}
    views = runs["ibot_strong"].views
    assert (views.num_large, views.weak_prob) == (4, 0.5)


def test_masks_lie_on_crops_of_the_teacher() -> None:
    with pytest.raises(ConfigError, match=r"large_crops is own.*clustering_input to unmasked"):
        load("vit_s16_ep100", views={"large_crops": "own"})


def test_linear_evaluations_of_the_reproduction() -> None:
    """The probe of DINO and iBOT at one rate, and that of Mugs, as for DINO."""

    def probes(name: str) -> dict[str, Any]:
        plan = build_plan(config.load_reproduction(name, STAGES))
        return {r.name: dump_settings(r.config) for r in plan if r.stage == "linear"}

    assert probes("ibot_vit_s16_ep100") == probes("dino_vit_s16_ep100")
    assert probes("ibot_vit_s16_ep100")["linear"]["base_lr"] == 1e-3
