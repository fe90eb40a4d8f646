"""Recipes: what the paper says as settings, how a run takes them over,
and that a default has one place.
"""

import subprocess
import sys
from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest

from pipeline import config
from pipeline.identity import dump_settings, run_id, runtime_names
from pipeline.reading import validate_model
from pipeline.spec import ConfigError, Resources
from stages import STAGES
from stages.pretrain import PretrainConfig

ROOT = Path(__file__).resolve().parents[3]
SPELLED_OUT: dict[str, Any] = {
    "epochs": 400,
    "arch": "vit_b16",
    "batch_size": 1024,
    "weight_decay": [0.1, 0.1],
    "clip": [[0, 3.0]],
    "mugs": {
        "drop_path": 0.2,
        "relation_depth": 2,
        "memories": "shared",
        "memory_pointer": "fifo",
        "local_group_token": "paper",
        "pair_average": "uniform",
    },
    "views": {"student_strength_draw": "per_image"},
}


def paper(arch: str, **changes: Any) -> PretrainConfig:
    settings = config.load_recipe(f"pretrain/paper_{arch}")
    assert settings.pop("stage") == "pretrain"
    return validate_model(PretrainConfig, settings | changes, "x.yaml")


def pretraining(*overrides: str, name: str = "mugs_vit_b16_ep400") -> PretrainConfig:
    found = config.load_reproduction(name, STAGES, overrides).runs["pretrain"].config
    assert isinstance(found, PretrainConfig)
    return found


def test_the_paper_is_what_it_spells_out_and_has_its_run_id() -> None:
    spelled = validate_model(PretrainConfig, SPELLED_OUT, "x.yaml")
    assert paper("vit_b16", epochs=400) == spelled
    released = validate_model(PretrainConfig, SPELLED_OUT | {"mugs": {}}, "x.yaml")
    assert run_id("pretrain", spelled, {}) != run_id("pretrain", released, {})


@pytest.mark.parametrize(
    ("arch", "batch", "drop_path", "decay", "clip"),
    [
        ("vit_s16", 1024, 0.1, 0.1, 3.0),
        ("vit_b16", 1024, 0.2, 0.1, 3.0),
        ("vit_l16", 640, 0.4, 0.08, 0.3),
    ],
)
def test_sizes_of_the_paper(
    arch: str, batch: int, drop_path: float, decay: float, clip: float
) -> None:
    cfg = paper(arch, epochs=1)
    assert (cfg.batch_size, cfg.mugs.drop_path, cfg.clip) == (batch, drop_path, ((0, clip),))
    assert cfg.weight_decay == (decay, decay)
    assert (cfg.arch, cfg.mugs.relation_depth, cfg.mugs.pair_average) == (arch, 2, "uniform")


def test_a_recipe_on_the_command_line_goes_over_the_file_and_under_other_settings() -> None:
    likes = "pretrain.like=pretrain/paper_vit_b16"
    cfg = pretraining("pretrain.mugs.pair_average=released", likes, "pretrain.seed=3")
    assert (cfg.batch_size, cfg.weight_decay, cfg.epochs) == (1024, (0.1, 0.1), 400)
    assert (cfg.mugs.relation_depth, cfg.mugs.pair_average, cfg.seed) == (2, "released", 3)
    assert pretraining().mugs.relation_depth == 1


def test_the_probe_of_another_release() -> None:
    runs = config.load_reproduction("evaluate_released", STAGES, ["linear.like=linear/l250"]).runs
    assert (runs["linear"].config.base_lr, runs["linear"].config.augmentation) == (None, "strong")


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("pretrain.like=pretrain/papr", "no recipe 'pretrain/papr'; did you mean 'pretrain/paper'"),
        ("pretrain.preset=paper", "presets are recipes now; write like: pretrain/paper"),
        ("linear.sweep={}", "give either base_lr or sweep, not both (from --set linear.sweep={})"),
    ],
)
def test_mistakes_stay_mistakes(override: str, words: str) -> None:
    with pytest.raises(ConfigError) as caught:
        pretraining(override, name="mugs_vit_s16_ep300")
    assert words in str(caught.value)


@pytest.mark.parametrize("file", config.list_recipe_files())
def test_every_recipe_has_settings_that_exist(file: str) -> None:
    for name in config.list_recipes(file):
        settings = config.load_recipe(name)
        stage = settings.pop("stage")
        # A recipe may also say what its runs need of a machine.
        Resources(**settings.pop("resources", {}))
        if stage == "finetune":
            settings["rate"] = {"base_lr": 1} | settings["rate"]
        if stage != "linear":
            # A recipe may take back a batch size, so that a run has to say its own.
            given = {key: value for key, value in settings.items() if value is not None}
            required = {"epochs": 1, "batch_size": 8}
            known = {field.name for field in fields(STAGES[stage].config)}
            settings = {key: required[key] for key in required.keys() & known} | given
        assert validate_model(STAGES[stage].config, settings, name)


def test_a_changed_default_in_one_place_changes_the_run() -> None:
    code = """
import sys, types, pathlib
module = types.ModuleType("mugs.methods.config")
text = pathlib.Path("mugs/methods/config.py").read_text()
default = "head_out: PositiveInt = 256"
assert default in text
changed = text.replace(default, default.replace("256", sys.argv[1]))
sys.modules["mugs.methods.config"] = module
exec(compile(changed, "config.py", "exec"), module.__dict__)
from stages.commands.reproduction import all_runs
run = next(run for run in all_runs("mugs_vit_s16_ep100") if run.name == "pretrain")
print(run.run_id, run.config.mugs.head_out)
"""
    found = []
    for value in ("256", "128"):
        line = [sys.executable, "-c", code, value]
        done = subprocess.run(line, cwd=ROOT, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        found.append(done.stdout.split())
    (before, wide), (after, narrow) = found
    assert before != after and (wide, narrow) == ("256", "128")


def test_former_names_of_settings_are_accepted_and_stay_in_records() -> None:
    old = ["pretrain.max_images_per_step=32", "pretrain.views.student_coin=per_image"]
    new = ["pretrain.micro_batch_size=32", "pretrain.views.student_strength_draw=per_image"]
    assert pretraining(*old) == pretraining(*new)
    assert pretraining(old[0], "pretrain.micro_batch_size=16").micro_batch_size == 16
    record = dump_settings(pretraining(*new))
    assert (record["max_images_per_step"], record["views"]["student_coin"]) == (32, "per_image")
    assert "max_images_per_step" in runtime_names(PretrainConfig)
    assert validate_model(PretrainConfig, record, "config.yaml") == pretraining(*new)
