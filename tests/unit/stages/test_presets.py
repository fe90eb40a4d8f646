"""The presets: what the paper says fills what is not given, and the run id follows what comes out."""

from typing import Any

import pytest
from pydantic import ValidationError

from pipeline import config
from pipeline.identity import run_id
from stages import STAGES
from stages.pretrain import MugsOptions, PretrainConfig, ViewOptions
from stages.shared.presets import BY_ARCH, MUGS, VIEWS

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
    return run_id("pretrain", PretrainConfig.model_validate(values), {})


def test_released_changes_nothing() -> None:
    plain = {"epochs": 100, "batch_size": 512}
    assert PretrainConfig.model_validate(
        plain | {"preset": "released"}
    ) == PretrainConfig.model_validate(plain)
    assert PretrainConfig.model_validate(plain).mugs == MugsOptions()


def test_the_paper_is_what_it_spells_out_and_has_its_run_id() -> None:
    short = {"preset": "paper", "epochs": 400, "arch": "vit_b16"}
    ours, spelled = PretrainConfig.model_validate(short), PretrainConfig.model_validate(SPELLED_OUT)
    assert ours.model_copy(update={"preset": "released"}) == spelled
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
    cfg = PretrainConfig.model_validate({"preset": "paper", "arch": arch, "epochs": 1})
    assert (cfg.batch_size, cfg.mugs.drop_path, cfg.clip) == (batch, drop_path, ((0, clip),))
    assert cfg.weight_decay == (decay, decay)


@pytest.mark.parametrize(
    "options", [{"pair_average": "released"}, MugsOptions(pair_average="released")]
)
def test_given_fields_stand(options: Any) -> None:
    values = {"preset": "paper", "epochs": 1, "batch_size": 256, "mugs": options}
    cfg = PretrainConfig.model_validate(values)
    assert (cfg.batch_size, cfg.mugs.pair_average, cfg.mugs.relation_depth) == (256, "released", 2)


def test_a_resolved_configuration_reads_back_the_same() -> None:
    cfg = PretrainConfig.model_validate({"preset": "paper", "epochs": 1})
    assert PretrainConfig.model_validate(cfg.model_dump(mode="json")) == cfg


def test_an_architecture_that_is_not_in_the_paper() -> None:
    cfg = PretrainConfig.model_validate(
        {"preset": "paper", "arch": "vit_mini", "epochs": 1, "batch_size": 8}
    )
    assert (cfg.mugs.relation_depth, cfg.mugs.drop_path) == (2, MugsOptions().drop_path)
    with pytest.raises(ValidationError, match="batch_size"):
        PretrainConfig.model_validate({"preset": "paper", "arch": "vit_mini", "epochs": 1})


@pytest.mark.parametrize(
    "values", [{"preset": "papr"}, {"preset": "paper", "mugs": 3}, {"preset": "paper", "x": 1}]
)
def test_mistakes_stay_mistakes(values: dict[str, Any]) -> None:
    with pytest.raises(ValidationError):
        PretrainConfig.model_validate({"epochs": 1, "batch_size": 8} | values)


def test_every_field_of_the_presets_exists() -> None:
    assert set(MUGS) <= set(MugsOptions.model_fields) and set(VIEWS) <= set(
        ViewOptions.model_fields
    )
    for own in BY_ARCH.values():
        assert set(own) <= set(PretrainConfig.model_fields) and set(own["mugs"]) <= set(
            MugsOptions.model_fields
        )


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
