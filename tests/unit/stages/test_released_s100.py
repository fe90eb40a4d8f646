"""The reproduction `mugs_vit_s16_ep100` has the settings of the released run."""

import pytest

from pipeline import config
from stages import STAGES


def test_s100_is_the_released_run() -> None:
    runs = config.load_reproduction("mugs_vit_s16_ep100", STAGES).runs
    cfg = runs["pretrain"].config
    assert cfg.peak_lr == pytest.approx(1.6e-3)
    assert (cfg.batch_size, cfg.steps_per_epoch, cfg.epochs, cfg.warmup_epochs) == (
        512,
        2502,
        100,
        10,
    )
    assert (cfg.min_lr, cfg.weight_decay, cfg.teacher_momentum) == (1e-6, (0.04, 0.2), 0.996)
    assert (cfg.clip, cfg.freeze_prototypes_epochs, cfg.precision, cfg.seed) == (
        ((0, 3.0),),
        1,
        "fp32",
        0,
    )
    method = cfg.mugs
    assert (method.queue_size, method.memory_size, method.num_prototypes) == (65536, 65536, 65536)
    assert (method.num_neighbours, method.relation_depth, method.drop_path) == (8, 1, 0.1)
    assert (method.instance_temperature, method.group_student_temperature) == (0.2, 0.1)
    assert method.group_teacher_temperature == (0.04, 0.04)
    linear = runs["linear"].config
    assert (linear.feature, linear.base_lr, linear.final_lr, linear.batch_size) == (
        "last4_cls",
        0.015,
        1e-5,
        1024,
    )
    assert (linear.augmentation, linear.epochs) == ("strong", 100)
    assert runs["knn"].config.ks == (10, 15, 20, 30, 40, 50, 100, 200)
