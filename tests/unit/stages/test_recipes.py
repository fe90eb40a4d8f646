"""The bundled reproductions are the released runs:
values written by hand from the recipe's table of the five runs.
"""

from dataclasses import dataclass

import pytest

from mugs.pretrain.schedule import PretrainSchedule
from mugs.pretrain.train import build_pretrain_schedule
from pipeline import config
from pipeline.identity import science_fields
from pipeline.plan import build_plan, list_unset_settings
from pipeline.spec import StageRun
from results.runs import flatten_config
from results.variants import describe_variant
from stages import STAGES
from stages.finetune import FinetuneStageConfig
from stages.logistic import LogisticConfig
from stages.pretrain import PretrainConfig
from stages.shared.image_data import PUBLIC


@dataclass(frozen=True)
class Expected:
    """A column of the table; `last_lr` and `last_wd` belong to the last step."""

    gpus: int
    per_gpu: int
    batch: int
    steps_per_epoch: int
    total_steps: int
    peak_lr: float
    min_lr: float
    last_lr: float
    weight_decay: tuple[float, float]
    last_wd: float
    drop_path: float
    temperature: tuple[float, float, int]
    magnitudes_trained: bool
    frozen: int
    clip: tuple[tuple[int, float], ...]


S_CLIP = ((0, 3.0),)
WARM = (0.04, 0.07, 30)
WARM50 = (0.04, 0.07, 50)
# fmt: off
EXPECTED = {
    "mugs_vit_s16_ep100": Expected(8, 64, 512, 2502, 250_200, 1.6e-3, 1e-6, 1.0000000778e-6,
                                   (0.04, 0.2), 0.19999999999369, 0.1, (0.04, 0.04, 0), True, 1,
                                   S_CLIP),
    "mugs_vit_s16_ep300": Expected(16, 64, 1024, 1251, 375_300, 3.2e-3, 1e-6, 1.0000000600e-6,
                                   (0.04, 0.1), 0.09999999999895, 0.1, WARM, True, 1, S_CLIP),
    "mugs_vit_s16_ep800": Expected(16, 64, 1024, 1251, 1_000_800, 3.2e-3, 1e-6, 1.0000000081e-6,
                                   (0.04, 0.1), 0.09999999999985, 0.1, WARM, True, 1, S_CLIP),
    "mugs_vit_b16_ep400": Expected(24, 42, 1008, 1271, 508_400, 3.15e-3, 2e-6, 2.0000000316e-6,
                                   (0.04, 0.1), 0.09999999999943, 0.1, WARM50, True, 3, S_CLIP),
    "mugs_vit_l16_ep250": Expected(40, 16, 640, 2001, 500_250, 3.75e-3, 1.5e-4, 1.500000000385e-4,
                                   (0.025, 0.08), 0.07999999999946, 0.3, WARM50, False, 3,
                                   ((0, 3.0), (101, 0.3))),
}
# fmt: on
LINEAR = {
    "mugs_vit_s16_ep100": ("last4_cls", 0.015, 1e-5, 1024, 4),
    "mugs_vit_s16_ep300": ("last4_cls", 0.02, 0.0, 1024, 4),
    "mugs_vit_s16_ep800": ("last4_cls", 0.01, 0.0, 1024, 4),
    "mugs_vit_b16_ep400": ("cls_patchmean", 0.002, 1e-5, 512, 4),
    "mugs_vit_l16_ep250": ("cls_patchmean", None, 1e-5, 1024, 8),
}


def planned(name: str) -> dict[str, StageRun]:
    return {run.name: run for run in build_plan(config.load_reproduction(name, STAGES))}


def pretraining(name: str) -> tuple[PretrainConfig, PretrainSchedule]:
    cfg = planned(name)["pretrain"].config
    assert isinstance(cfg, PretrainConfig) and cfg.steps_per_epoch is not None
    return cfg, build_pretrain_schedule(cfg, cfg.steps_per_epoch)


def test_every_bundled_reproduction_is_here_and_plans() -> None:
    transfer = {"mugs_vit_s16_ep800_transfer", "mugs_vit_b16_ep400_transfer", "transfer_data"}
    assert set(config.list_bundled()) >= {
        "mini",
        *EXPECTED,
        *transfer,
        "mugs_vit_s16_ep800_semi",
    }
    for name in config.list_bundled():
        assert build_plan(config.load_reproduction(name, STAGES))


@pytest.mark.parametrize("name", EXPECTED)
def test_recipe(name: str) -> None:
    want, (cfg, _) = EXPECTED[name], pretraining(name)
    resources = planned(name)["pretrain"].resources
    assert (resources.gpus, cfg.batch_size // resources.gpus) == (want.gpus, want.per_gpu)
    assert (cfg.batch_size, cfg.steps_per_epoch, cfg.warmup_epochs) == (
        want.batch,
        want.steps_per_epoch,
        10,
    )
    method = cfg.mugs
    assert method.drop_path == want.drop_path
    assert method.queue_size == method.memory_size == method.num_prototypes == 65536
    assert (
        *method.group_teacher_temperature,
        method.group_teacher_warmup_epochs,
    ) == want.temperature
    assert method.train_prototype_magnitude is want.magnitudes_trained
    assert (cfg.freeze_prototypes_epochs, cfg.clip) == (want.frozen, want.clip)
    assert (cfg.teacher_momentum, cfg.patch_lr_scale, cfg.precision, cfg.seed) == (
        0.996,
        0.2,
        "fp32",
        0,
    )
    assert (cfg.views.num_small, cfg.views.weak_prob, method.relation_depth) == (10, 0.5, 1)
    assert (
        method.instance_temperature,
        method.group_student_temperature,
        method.num_neighbours,
    ) == (0.2, 0.1, 8)


@pytest.mark.parametrize("name", EXPECTED)
def test_schedule(name: str) -> None:
    want, (cfg, schedule) = EXPECTED[name], pretraining(name)
    assert schedule.total_steps == want.total_steps
    warm, last = 10 * want.steps_per_epoch, want.total_steps - 1
    assert cfg.peak_lr == pytest.approx(want.peak_lr, rel=1e-12)
    assert schedule.lr(0) == 0
    assert [schedule.lr(warm - 1), schedule.lr(warm)] == pytest.approx(
        [want.peak_lr] * 2, rel=1e-12
    )
    assert cfg.min_lr == want.min_lr
    assert (
        schedule.lr(last) == pytest.approx(want.last_lr, rel=1e-10)
        and schedule.lr(last) > want.min_lr
    )
    assert schedule.wd(0) == pytest.approx(want.weight_decay[0], rel=1e-12)
    assert schedule.wd(last) == pytest.approx(want.last_wd, rel=1e-12)
    assert cfg.weight_decay == want.weight_decay
    assert [schedule.teacher_momentum(s) for s in (0, last)] == pytest.approx(
        [0.996, 1.0], abs=1e-9
    )


@pytest.mark.parametrize("name", LINEAR)
def test_evaluations(name: str) -> None:
    runs = planned(name)
    linear, knn = runs["linear"], vars(runs["knn"].config)
    fields = [vars(linear.config)[f] for f in ("feature", "base_lr", "final_lr", "batch_size")]
    assert (*fields, linear.resources.gpus) == LINEAR[name]
    assert vars(linear.config)["augmentation"] == "strong" and vars(linear.config)["epochs"] == 100
    assert knn["ks"] == (10, 15, 20, 30, 40, 50, 100, 200)
    assert knn["temperatures"] == (0.05 if "_s16" in name else 0.04, 0.07)


@pytest.mark.parametrize("name", EXPECTED)
def test_fine_tuning(name: str) -> None:
    """One GPU's images share a mixup draw, as in the released runs;
    ViT-L has two groups on each of 8 GPUs.
    """
    run, arch = planned(name)["finetune"], planned(name)["pretrain"].config.arch
    cfg = run.config
    assert isinstance(cfg, FinetuneStageConfig) and cfg.weights == "teacher"
    share = cfg.batch_size // run.resources.gpus
    assert (share, cfg.mix.group) == {
        "vit_s16": (256, 256),
        "vit_b16": (128, 128),
        "vit_l16": (128, 64),
    }[arch]
    assert run.needs == {
        "data": planned(name)["imagenet"].run_id,
        "weights": planned(name)["pretrain"].run_id,
    }


@pytest.mark.parametrize(
    ("name", "arch"), [("mugs_vit_s16_ep800", "vit_s16"), ("mugs_vit_b16_ep400", "vit_b16")]
)
def test_transfer(name: str, arch: str) -> None:
    runs = planned(f"{name}_transfer")
    assert runs["pretrain"].run_id == planned(name)["pretrain"].run_id
    for dataset in PUBLIC:
        run, data = runs[f"transfer_{dataset}"], runs[dataset]
        assert run.needs == {"data": data.run_id, "weights": runs["pretrain"].run_id}
        assert vars(data.config)["dataset"] == dataset
        recipe = config.load_recipe(f"finetune/{dataset}_{arch}")
        assert isinstance(run.config, FinetuneStageConfig)
        assert run.config.rate.base_lr == recipe["rate"]["base_lr"]
        assert run.config.batch_size // run.resources.gpus == run.config.mix.group == 192
    missing = [line.split()[0] for line in list_unset_settings(runs.values())]
    assert sorted(missing) == sorted(
        [*(f"{d}.root" for d in PUBLIC), "imagenet.train_dir", "imagenet.val_dir"]
    )


def test_semi_supervised() -> None:
    runs = planned("mugs_vit_s16_ep800_semi")
    assert runs["pretrain"].run_id == planned("mugs_vit_s16_ep800")["pretrain"].run_id
    for part, batch in ((1, 512), (10, 1024)):
        run = runs[f"finetune_{part}pct"]
        assert isinstance(run.config, FinetuneStageConfig) and run.config.labelled is not None
        assert (run.config.labelled.percent, run.config.labelled.last_line) == (part, "kept")
        assert (run.config.batch_size, batch // run.resources.gpus) == (batch, run.config.mix.group)
        logistic = runs[f"logistic_{part}pct"].config
        assert isinstance(logistic, LogisticConfig) and logistic.labelled.percent == part
        assert logistic.penalties == (0.01, 0.03, 0.06, 0.10, 0.15, 0.20, 0.30)
    lists = {line.split()[0] for line in list_unset_settings(runs.values()) if "list_file" in line}
    assert lists == {
        f"{kind}_{p}pct.labelled.list_file" for kind in ("finetune", "logistic") for p in (1, 10)
    }


ABLATIONS = {
    "mini_ablations": (
        "without_instance",
        "without_local_group",
        "without_group",
        "strong_augmentation",
        "two_crops",
    ),
    "mugs_vit_s16_ep100_ablations": (
        "without_instance",
        "without_local_group",
        "without_group",
        "weak_augmentation",
    ),
    "mugs_vit_s16_ep800_two_crops": ("two_crops",),
}
CHANGED = {
    "without_instance": ("mugs.loss_weights", [0.0, 1.0, 1.0], "w/o instance supervision"),
    "without_local_group": ("mugs.loss_weights", [1.0, 0.0, 1.0], "w/o local-group supervision"),
    "without_group": ("mugs.loss_weights", [1.0, 1.0, 0.0], "w/o group supervision"),
    "weak_augmentation": ("views.weak_prob", 1.0, "weak augmentation"),
    "strong_augmentation": ("views.weak_prob", 0.5, "strong augmentation"),
    "two_crops": ("views.num_small", 0, "two crops"),
}


@pytest.mark.parametrize(
    ("name", "ablation"), [(name, each) for name, runs in ABLATIONS.items() for each in runs]
)
def test_an_ablation_differs_in_what_it_is_about(name: str, ablation: str) -> None:
    """And is evaluated as the run that it is like, from its own weights,
    under the name the tables know it by.
    """
    runs = planned(name)
    mine, whole = science_fields(runs[ablation].config), science_fields(runs["pretrain"].config)
    here, there = flatten_config(mine), flatten_config(whole)
    key, value, words = CHANGED[ablation]
    assert {k: v for k, v in here.items() if v != there[k]} == {key: value}
    assert (
        describe_variant(mine, str(here["arch"])),
        describe_variant(whole, str(there["arch"])),
    ) == (words, "")
    evaluations = [kind for kind in ("features", "knn", "linear") if f"{kind}_{ablation}" in runs]
    assert "linear" in evaluations
    for kind in evaluations:
        run = runs[f"{kind}_{ablation}"]
        assert run.config == runs[kind].config and run.resources == runs[kind].resources
        source = (
            runs[f"features_{ablation}"].run_id
            if "features" in run.needs
            else runs[ablation].run_id
        )
        assert source in run.needs.values() and runs["pretrain"].run_id not in run.needs.values()
