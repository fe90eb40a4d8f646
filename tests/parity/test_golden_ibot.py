"""The released iBOT code's numbers on a tiny model (golden/README.md), through the public API."""

import random
from functools import partial

import numpy as np
import pytest
import torch
from golden_cases import (
    GOLDEN,
    Golden,
    check_gradient_norms,
    check_norms,
    check_rates,
    load_golden,
)
from torch import Tensor

from mugs.data.loading.batch import Views
from mugs.methods.class_tokens import rename
from mugs.methods.config import IbotConfig
from mugs.methods.ibot import Ibot, IbotNetwork
from mugs.methods.ibot_masks import MaskShape, draw_mask, draw_ratio
from mugs.models.vit import build_vit
from mugs.weights.backbone_file import extract_backbone_state, load_strictly
from mugs.weights.pickle_file import WeightsError


@pytest.fixture(params=["ibot_tiny", "ibot_table8weak"])
def golden(request: pytest.FixtureRequest) -> Golden:
    return load_golden(request.param)


@pytest.fixture
def method(golden: Golden) -> Ibot:
    config = golden.config
    ibot = Ibot(
        IbotConfig(
            arch=golden.arch,
            drop_path=0.0,
            head_hidden=config["head_hidden_dim"],
            bottleneck=config["bottleneck_dim"],
            num_prototypes=config["out_dim"],
            shared_head=config["shared_head"],
            train_prototype_magnitude=not config["norm_last_layer"],
            student_temperature=config["student_temp"],
            teacher_temperature=(config["warmup_teacher_temp"], config["teacher_temp"]),
            patch_teacher_temperature=(
                config["warmup_teacher_patch_temp"],
                config["teacher_patch_temp"],
            ),
            teacher_warmup_epochs=config["warmup_teacher_temp_epochs"],
            center_momentum=config["center_momentum"],
            loss_weights=(config["lambda1"], config["lambda2"]),
            mask_ratios=tuple(config["pred_ratio"]),
            mask_half_widths=tuple(config["pred_ratio_var"]),
            mask_start_epoch=config["pred_start_epoch"],
            clustering_input=config["clustering_input"],
        )
    )
    ibot.load_released(golden.checkpoint)
    return ibot


def make_views(golden: Golden, step: int) -> Views:
    """Images of a step, with the released masks (crops, N, V, V) image by image."""
    masks = torch.from_numpy(golden.arrays["masks"][step]).bool().transpose(0, 1)
    return golden.views(step, {"masks": masks})


def patch_logits(network: IbotNetwork, tokens: Tensor) -> Tensor:
    return network.patch_prototypes(network.head.project(tokens[:, 1:]))[:, ::14]


@torch.no_grad()
def test_step_0_outputs(golden: Golden, method: Ibot) -> None:
    views = make_views(golden, 0)
    student, teacher = method.student, method.teacher
    masks = views.extras["masks"].transpose(0, 1).flatten(2)
    assert student.masked_embed is not None
    seen = student.run(views.large, 0, (masks.flatten(0, 1), student.masked_embed[0]))
    whole = teacher.run(views.large, 0)
    crops = method._make_student_crops(views, masks)
    index, _ = method._choose_patches(masks.flatten(0, 1))
    classes, _ = student(crops, index)
    found = {
        "student/cls": classes[:2].flatten(0, 1),
        "student/local_cls": classes[2:].flatten(0, 1),
        "student/patch": patch_logits(student, seen),
        "teacher/cls": teacher.head(whole[:, 0]),
        "teacher/patch": patch_logits(teacher, whole),
    }
    for name, value in found.items():
        expected = golden.arrays[f"step0/{name}"]
        np.testing.assert_allclose(value, expected, atol=5e-6, rtol=0, err_msg=name)


def test_gradients_of_step_0(golden: Golden, method: Ibot) -> None:
    check_gradient_norms(golden, method, make_views(golden, 0), partial(rename, released=True))


def test_twelve_steps(golden: Golden, method: Ibot) -> None:
    trainer = golden.trainer(method)
    for record in golden.steps:
        step = record["step"]
        check_rates(trainer, record)
        result = trainer.step([make_views(golden, step)], step)
        assert result.total.item() == pytest.approx(record["total"], abs=5e-6)
        for name, expected in record["losses"].items():
            assert result.losses[name].item() == pytest.approx(expected, abs=5e-6)
        released = method.released_state()
        check_norms({name: released[name] for name in ("student", "teacher")}, record)
        centers = [method.extra_state.center, method.extra_state.center2]
        norms = [center.norm().item() for center in centers]
        assert norms == pytest.approx(record["center_norm"], abs=1e-5)
    for name in ("center", "center2"):
        np.testing.assert_allclose(
            released["ibot_loss"][name], golden.arrays[name], atol=1e-5, rtol=0
        )
    for name, expected in golden.arrays.items():
        if name.startswith("final/"):
            _, who, key = name.split("/")
            ours = {k.removeprefix("module."): v for k, v in released[who].items()}[key]
            np.testing.assert_allclose(ours, expected, atol=2e-5, err_msg=name)


def test_a_released_checkpoint_goes_in_and_out(golden: Golden, method: Ibot) -> None:
    released = method.released_state()
    for part in ("student", "teacher", "ibot_loss"):
        theirs = golden.checkpoint[part]
        assert released[part].keys() == theirs.keys()
        assert all(torch.equal(released[part][key], value) for key, value in theirs.items())


def test_keys_that_do_not_fit_are_named(golden: Golden, method: Ibot) -> None:
    student = dict(golden.checkpoint["student"])
    student["module.head.mlp.6.weight"] = student.pop("module.head.mlp.4.weight")
    with pytest.raises(WeightsError, match=r"student: .*projector\.4\.weight.*projector\.6"):
        method.load_released({**golden.checkpoint, "student": student})


def test_prototypes_that_are_not_shared_are_not_dropped(golden: Golden, method: Ibot) -> None:
    teacher = dict(golden.checkpoint["teacher"])
    teacher["head.last_layer2.weight_v"] = teacher["head.last_layer2.weight_v"] + 1
    with pytest.raises(WeightsError, match="class and patch tokens have"):
        method.load_released({**golden.checkpoint, "teacher": teacher})


@pytest.mark.parametrize("which", ["teacher", "student"])
def test_its_backbone_is_imported(golden: Golden, method: Ibot, which: str) -> None:
    """From the full checkpoint, and from the file with the backbone alone."""
    images = golden.views(0, {}).large[0]
    network = getattr(method, which)
    expected = network.backbone.cls_feature(images)
    state, left_out = extract_backbone_state(golden.checkpoint, which)
    names = {key.removeprefix("module.") for key in left_out}
    assert {name for name in names if not name.startswith("head.")} == (
        {"backbone.masked_embed"} if which == "student" else set()
    )
    with_mask_vector = {**state, "masked_embed": torch.zeros(1, golden.arch.embed_dim)}
    for checkpoint in (golden.checkpoint, state, with_mask_vector):
        vit = build_vit(golden.arch)
        load_strictly(vit, extract_backbone_state(checkpoint, which)[0], "file")
        torch.testing.assert_close(vit.cls_feature(images), expected, atol=5e-6, rtol=0)


class ReleasedDraws(random.Random):
    """What the released masks are drawn from: Python's generator, and numpy's for shuffling."""

    def __init__(self, seed: int) -> None:
        super().__init__(seed)
        self.shuffle = np.random.RandomState(seed).shuffle


@pytest.mark.parametrize(
    ("name", "ratios", "half_widths", "shape"),
    [
        ("block/0_0.3+-0.2", (0.0, 0.3), (0.0, 0.2), "block"),
        ("block/0.3", (0.3,), (0.0,), "block"),
        ("block/0.3+-0.2/small", (0.3,), (0.2,), "block"),
        ("rand/0_0.7+-0.05", (0.0, 0.7), (0.0, 0.05), "random"),
    ],
)
def test_masks_bit_by_bit(
    name: str, ratios: tuple[float, ...], half_widths: tuple[float, ...], shape: MaskShape
) -> None:
    arrays = np.load(GOLDEN / "ibot_tiny" / "masks.npz")
    seeds, crops, side, _ = arrays[f"{name}/shape"]
    expected = np.unpackbits(arrays[name], axis=-1, count=side).astype(bool)
    for seed in range(seeds):
        draws = ReleasedDraws(seed)
        for crop in range(crops):
            ratio = draw_ratio(draws, ratios, half_widths)
            found = draw_mask(draws, int(side), ratio, shape)
            np.testing.assert_array_equal(found, expected[seed, crop], err_msg=f"{seed}, {crop}")
