"""The presets: what the paper says fills what is not given, and the run id follows what comes out."""

from dataclasses import replace
from typing import Any

import pytest

from pipeline import config
from pipeline.identity import dump_settings, run_id
from pipeline.reading import validate_model
from pipeline.spec import ConfigError
from stages import STAGES
from stages.pretrain import MugsConfig, PretrainConfig

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
    "views": {"student_coin": "per_image"},
}


def identity(values: dict[str, Any]) -> str:
    return run_id("pretrain", validate_model(PretrainConfig, values, "x.yaml"), {})


def test_released_changes_nothing() -> None:
    plain = {"epochs": 100, "batch_size": 512}
    assert validate_model(
        PretrainConfig, plain | {"preset": "released"}, "x.yaml"
    ) == validate_model(PretrainConfig, plain, "x.yaml")
    assert validate_model(PretrainConfig, plain, "x.yaml").mugs == MugsConfig()


def test_the_paper_is_what_it_spells_out_and_has_its_run_id() -> None:
    short = {"preset": "paper", "epochs": 400, "arch": "vit_b16"}
    ours, spelled = (
        validate_model(PretrainConfig, short, "x.yaml"),
        validate_model(PretrainConfig, SPELLED_OUT, "x.yaml"),
    )
    assert replace(ours, preset="released") == spelled
    assert identity(short) == identity(SPELLED_OUT) == identity(SPELLED_OUT | {"preset": "paper"})
    assert identity(short) != identity(SPELLED_OUT | {"mugs": {}})


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
    cfg = validate_model(PretrainConfig, {"preset": "paper", "arch": arch, "epochs": 1}, "x.yaml")
    assert (cfg.batch_size, cfg.mugs.drop_path, cfg.clip) == (batch, drop_path, ((0, clip),))
    assert cfg.weight_decay == (decay, decay)


@pytest.mark.parametrize(
    "options", [{"pair_average": "released"}, {"pair_average": "released", "drop_path": None}]
)
def test_given_fields_stand(options: Any) -> None:
    values = {"preset": "paper", "epochs": 1, "batch_size": 256, "mugs": options}
    cfg = validate_model(PretrainConfig, values, "x.yaml")
    assert (cfg.batch_size, cfg.mugs.pair_average, cfg.mugs.relation_depth) == (256, "released", 2)


def test_a_resolved_configuration_reads_back_the_same() -> None:
    cfg = validate_model(PretrainConfig, {"preset": "paper", "epochs": 1}, "x.yaml")
    assert validate_model(PretrainConfig, dump_settings(cfg), "x.yaml") == cfg


def test_an_architecture_that_is_not_in_the_paper() -> None:
    cfg = validate_model(
        PretrainConfig,
        {"preset": "paper", "arch": "vit_mini", "epochs": 1, "batch_size": 8},
        "x.yaml",
    )
    assert (cfg.mugs.relation_depth, cfg.mugs.drop_path) == (2, MugsConfig().drop_path)
    with pytest.raises(ConfigError, match="batch_size"):
        validate_model(
            PretrainConfig, {"preset": "paper", "arch": "vit_mini", "epochs": 1}, "x.yaml"
        )


@pytest.mark.parametrize(
    "values", [{"preset": "papr"}, {"preset": "paper", "mugs": 3}, {"preset": "paper", "x": 1}]
)
def test_mistakes_stay_mistakes(values: dict[str, Any]) -> None:
    with pytest.raises(ConfigError):
        validate_model(PretrainConfig, {"epochs": 1, "batch_size": 8} | values, "x.yaml")


def test_through_a_bundled_reproduction() -> None:
    cfg = (
        config.load("mugs_vit_s16_ep300", STAGES, ["pretrain.preset=paper"]).runs["pretrain"].config
    )
    assert isinstance(cfg, PretrainConfig)
    assert (cfg.mugs.relation_depth, cfg.mugs.pair_average, cfg.views.student_coin) == (
        2,
        "uniform",
        "per_image",
    )
    assert cfg.weight_decay == (0.04, 0.1)  # given by the reproduction


def test_null_in_a_bundled_reproduction_asks_for_the_paper() -> None:
    nulls = [
        f"pretrain.{key}=null"
        for key in ("batch_size", "steps_per_epoch", "weight_decay", "mugs.drop_path")
    ]
    cfg = (
        config.load("mugs_vit_b16_ep400", STAGES, ["pretrain.preset=paper", *nulls])
        .runs["pretrain"]
        .config
    )
    assert isinstance(cfg, PretrainConfig)
    assert (cfg.batch_size, cfg.steps_per_epoch, cfg.weight_decay) == (1024, None, (0.1, 0.1))
    assert cfg.mugs.drop_path == 0.2
