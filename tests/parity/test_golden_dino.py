"""The released DINO code's numbers on a tiny model (golden/README.md), through the public API."""

from functools import partial

import numpy as np
import pytest
import torch
from golden_cases import Golden, check_gradient_norms, check_norms, check_rates, load_golden

from mugs.losses.clustering import teacher_temperature_at
from mugs.methods.class_tokens import rename
from mugs.methods.config import DinoConfig
from mugs.methods.dino import Dino
from mugs.models.vit import build_vit
from mugs.weights.backbone_file import WeightsError, extract_backbone_state, load_strictly


@pytest.fixture(params=["dino_tiny", "dino_strong"])
def golden(request: pytest.FixtureRequest) -> Golden:
    return load_golden(request.param)


@pytest.fixture
def method(golden: Golden) -> Dino:
    config = golden.config
    dino = Dino(
        DinoConfig(
            arch=golden.arch,
            drop_path=0.0,
            head_hidden=config["head_hidden_dim"],
            bottleneck=config["bottleneck_dim"],
            num_prototypes=config["out_dim"],
            train_prototype_magnitude=not config["norm_last_layer"],
            student_temperature=config["student_temp"],
            teacher_temperature=(config["warmup_teacher_temp"], config["teacher_temp"]),
            teacher_warmup_epochs=config["warmup_teacher_temp_epochs"],
            center_momentum=config["center_momentum"],
        )
    )
    dino.load_released(golden.checkpoint)
    return dino


def num_large(golden: Golden) -> int:
    return 4 if golden.config["student_crops"] == "own" else 2


def test_step_0_outputs(golden: Golden, method: Dino) -> None:
    views = golden.views(0, {}, num_large=num_large(golden))
    with torch.no_grad():
        student = method.student([views.large[-2:], views.small]).flatten(0, 1)
        teacher = method.teacher([views.large[:2]]).flatten(0, 1)
    np.testing.assert_allclose(student, golden.arrays["step0/student"], atol=5e-6, rtol=0)
    np.testing.assert_allclose(teacher, golden.arrays["step0/teacher"], atol=5e-6, rtol=0)


def test_gradients_of_step_0(golden: Golden, method: Dino) -> None:
    views = golden.views(0, {}, num_large=num_large(golden))
    check_gradient_norms(golden, method, views, partial(rename, released=True))


def test_twelve_steps(golden: Golden, method: Dino) -> None:
    trainer = golden.trainer(method)
    for record in golden.steps:
        step = record["step"]
        check_rates(trainer, record)
        temperature = teacher_temperature_at(record["epoch"], start=0.04, end=0.07, warmup_epochs=3)
        assert temperature == pytest.approx(record["teacher_temp"], rel=1e-12)
        result = trainer.step([golden.views(step, {}, num_large=num_large(golden))], step)
        assert result.total.item() == pytest.approx(record["total"], abs=5e-6)
        assert result.losses["cls"].item() == pytest.approx(record["losses"]["cls"], abs=5e-6)
        released = method.released_state()
        check_norms({name: released[name] for name in ("student", "teacher")}, record)
        center = method.extra_state.center.norm().item()
        assert center == pytest.approx(record["center_norm"], abs=1e-5)
    np.testing.assert_allclose(released["dino_loss"]["center"], golden.arrays["center"], atol=1e-5)
    for name, expected in golden.arrays.items():
        if name.startswith("final/"):
            _, who, key = name.split("/")
            ours = {k.removeprefix("module."): v for k, v in released[who].items()}[key]
            np.testing.assert_allclose(ours, expected, atol=2e-5, err_msg=name)


def test_a_released_checkpoint_goes_in_and_out(golden: Golden, method: Dino) -> None:
    released = method.released_state()
    for part in ("student", "teacher", "dino_loss"):
        theirs = golden.checkpoint[part]
        assert released[part].keys() == theirs.keys()
        assert all(torch.equal(released[part][key], value) for key, value in theirs.items())


def test_keys_that_do_not_fit_are_named(golden: Golden, method: Dino) -> None:
    teacher = dict(golden.checkpoint["teacher"])
    teacher["head.mlp.6.weight"] = teacher.pop("head.mlp.4.weight")
    with pytest.raises(
        WeightsError, match=r"teacher: .*projector\.4\.weight.*projector\.6\.weight"
    ):
        method.load_released({**golden.checkpoint, "teacher": teacher})


def test_its_backbone_is_imported(golden: Golden, method: Dino) -> None:
    """From the full checkpoint, and from the file with the backbone alone."""
    images = golden.views(0, {}).large[0]
    expected = method.teacher.backbone.cls_feature(images)
    state, left_out = extract_backbone_state(golden.checkpoint)
    assert {key.split(".")[0] for key in left_out} == {"head"}
    for checkpoint in (golden.checkpoint, state):
        vit = build_vit(golden.arch)
        load_strictly(vit, extract_backbone_state(checkpoint)[0], "file")
        torch.testing.assert_close(vit.cls_feature(images), expected, atol=5e-6, rtol=0)
