"""The released MGC code's numbers on a tiny model (golden/README.md), through the public API."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from golden_cases import Golden, check_norms, check_rates, gradient_norms, load_golden
from torch import Tensor, nn

from mugs.data.loading.batch import Views
from mugs.methods.config import MgcConfig
from mugs.methods.mgc import LEVELS, Mgc, pool_patches, release_name
from mugs.methods.mgc_pairs import Pairs
from mugs.models.config import ViTConfig
from mugs.models.heads import build_mlp
from mugs.models.vit import build_sincos_positions, build_vit
from mugs.weights.backbone_file import (
    WeightsError,
    extract_backbone_state,
    load_released_backbone,
    load_strictly,
)

# Its gradient is 0 but for rounding, and AdamW makes steps of that.
WITHOUT_EFFECT = ("base_encoder.norm.bias", "momentum_encoder.norm.bias")
# Steps without equal boxes, and without equally good pairs of which some are kept.
WITHOUT_TIES = (1, 2, 7, 8)


@pytest.fixture(scope="module")
def golden() -> Golden:
    return load_golden("mgc_tiny")


@pytest.fixture(scope="module")
def checks() -> dict[str, np.ndarray]:
    return dict(np.load(f"{__file__.rpartition('/')[0]}/golden/mgc_tiny/checks.npz"))


def build(golden: Golden, **options: Any) -> Mgc:
    config = golden.config
    mgc = Mgc(
        MgcConfig(
            arch=ViTConfig(
                embed_dim=config["embed_dim"],
                depth=config["depth"],
                num_heads=config["num_heads"],
                positions="sincos",
            ),
            drop_path=0.0,
            head_hidden=config["mlp_dim"],
            head_out=config["dim"],
            num_pairs=tuple(config["pairs"]),
            temperature=config["temp"],
            **options,
        )
    )
    mgc.load_released(golden.checkpoint)
    return mgc


@pytest.fixture
def method(golden: Golden) -> Mgc:
    return build(golden)


def views_of(golden: Golden, step: int) -> Views:
    # Ours are left, top, width, height; the file has left, top, height, width.
    boxes = torch.from_numpy(golden.arrays["boxes"][step].astype(np.int64))[..., [0, 1, 3, 2]]
    extras = {"boxes": boxes, "flips": torch.from_numpy(golden.arrays["flips"][step])}
    return golden.views(step, extras, blocks=4)


def recorded_pairs(golden: Golden, step: int) -> dict[str, Pairs]:
    pairs = {}
    for level in LEVELS:
        first, second, shares = (
            torch.from_numpy(golden.arrays[f"pairs/{level}/{name}"][step])
            for name in ("i1", "i2", "w")
        )
        pairs[level] = Pairs(torch.stack([first, second]), shares.float())
    return pairs


def released_norms(method: Mgc) -> dict[str, dict[str, Tensor]]:
    state = method.released_state()["state_dict"]
    return {"student": state, "teacher": state}


def test_teacher_moves_before_its_first_pass(golden: Golden, method: Mgc) -> None:
    before = {k: v.clone() for k, v in method.teacher.state_dict().items()}
    method.before_forward(0.996)
    student = dict(method.student.state_dict())
    for name, value in method.teacher.state_dict().items():
        torch.testing.assert_close(value, 0.996 * before[name] + 0.004 * student[name])


# In float64 the rounding of the release alone is left. In float32 ours adds to it: batch
# normalization of few rows amplifies both, by how much depends on the vector instructions.
@pytest.mark.parametrize(("dtype", "bound"), [(torch.float64, 1e-5), (torch.float32, 2e-5)])
def test_step_0_outputs(golden: Golden, method: Mgc, dtype: torch.dtype, bound: float) -> None:
    method.before_forward(0.996)
    networks = method.student.to(dtype), method.teacher.to(dtype)
    crops = golden.views(0, {}, blocks=4).large.to(dtype)
    cells = {level: pairs.cells for level, pairs in recorded_pairs(golden, 0).items()}
    for network, letter in zip(networks, ("p", "z"), strict=True):
        with torch.no_grad():
            rows = network(crops, cells)
        for level in LEVELS:
            for crop in (0, 1):
                expected = golden.arrays[f"step0/{level}/{letter}{crop + 1}"]
                np.testing.assert_allclose(rows[level][crop], expected, atol=bound, rtol=0)


def test_twelve_steps(golden: Golden, method: Mgc, monkeypatch: pytest.MonkeyPatch) -> None:
    """With the pairs of the file: of pairs that share equally much, the release keeps any."""
    trainer = golden.trainer(method, decay="all")
    for record in golden.steps:
        step = record["step"]
        check_rates(trainer, record)
        found = iter(recorded_pairs(golden, step).values())
        monkeypatch.setattr("mugs.methods.mgc.find_pairs", lambda *_, found=found: next(found))
        result = trainer.step([views_of(golden, step)], step)
        assert result.total.item() == pytest.approx(record["total"], abs=5e-6)
        for level in LEVELS:
            expected = record["losses"][level]
            assert result.losses[level].item() == pytest.approx(expected, abs=2e-5)
        norms = record["query_value_norm"]
        by_network = {"query_value_norm": {"student": norms, "teacher": norms}}
        check_norms(released_norms(method), {**record, **by_network}, skipped=WITHOUT_EFFECT)
    state = method.released_state()["state_dict"]
    for name, expected in golden.arrays.items():
        if name.startswith("final/"):
            np.testing.assert_allclose(state[name[6:]], expected, atol=2e-5, err_msg=name)


@pytest.mark.parametrize("step", WITHOUT_TIES)
def test_own_pairs_give_the_same_losses(golden: Golden, method: Mgc, step: int) -> None:
    views = views_of(golden, step)
    with torch.no_grad():
        ours, _ = method.compute_losses(method.student, views, 0)
        theirs = method.compare(method.student, views.large, recorded_pairs(golden, step))
    torch.testing.assert_close(ours, theirs, atol=2e-6, rtol=0)


def test_gradients_of_step_0(golden: Golden, method: Mgc) -> None:
    """Their norms; none for the class token that comes out of the backbone, one for all others."""
    method.before_forward(golden.steps[0]["momentum"])
    outputs = []
    method.student.backbone.blocks[-1].register_forward_hook(
        lambda _module, _inputs, output: (output.retain_grad(), outputs.append(output))[1]
    )
    views = golden.views(0, {}, blocks=4)
    losses = method.compare(method.student, views.large, recorded_pairs(golden, 0))
    torch.stack([method.loss_weights[n] * v for n, v in losses.items()]).sum().backward()
    (tokens,) = outputs
    assert not tokens.grad[:, 0].any()
    assert tokens.grad[:, 1:].any()

    ours = {
        release_name(f"student.{name}"): norm
        for name, norm in gradient_norms(method.student).items()
    }
    expected = golden.steps[0]["grad_norms_before_clip"]
    trained = {n for n, p in method.student.named_parameters() if p.requires_grad}
    assert ours.keys() == {release_name(f"student.{name}") for name in trained}
    largest = max(expected.values())
    for name, norm in ours.items():
        assert norm == pytest.approx(expected[name], abs=1e-5 * largest), name
    assert ours["base_encoder.norm.bias"] < 1e-4


def test_a_released_checkpoint_goes_in_and_out(golden: Golden, method: Mgc) -> None:
    """All keys, also of the running statistics, which nothing uses."""
    released = method.released_state()["state_dict"]
    theirs = golden.checkpoint["state_dict"]
    assert released.keys() == theirs.keys()
    for key, value in theirs.items():
        assert released[key].shape == value.shape
        if "running" not in key and "num_batches" not in key:
            assert torch.equal(released[key], value)


def test_keys_that_do_not_fit_are_named(golden: Golden, method: Mgc) -> None:
    state = dict(golden.checkpoint["state_dict"])
    state["projector_patch.9.weight"] = state.pop("projector_patch.6.weight")
    with pytest.raises(WeightsError, match=r"part\.6\.weight.*part\.9\.weight"):
        method.load_released({**golden.checkpoint, "state_dict": state})


def test_a_frozen_bias_does_not_move(golden: Golden) -> None:
    method = build(golden, final_norm_bias="frozen")
    bias = method.student.backbone.norm.bias
    before = bias.clone()
    trainer = golden.trainer(method, decay="all")
    for step in (1, 2):
        trainer.step([views_of(golden, step)], step)
    assert torch.equal(bias, before)


def build_head(widths: list[int], state: dict[str, Tensor], prefix: str) -> nn.Sequential:
    head = build_mlp(widths, bias=False, norm="batch", activation="relu", norm_output=True)
    own = {key: state[prefix + key] for key in head.state_dict()}
    load_strictly(head, own, prefix)
    return head


def test_modules(golden: Golden, checks: dict[str, np.ndarray]) -> None:
    """Pooling, backbone, projector and predictor, on arrays of one generator in this order."""
    state = {
        key.removeprefix("model/"): torch.from_numpy(value)
        for key, value in checks.items()
        if key.startswith("model/")
    }
    backbone = build_vit(ViTConfig(embed_dim=48, depth=2, num_heads=4, positions="sincos"))
    load_strictly(backbone, extract_backbone_state(state, "student")[0], "checks.npz")
    heads = {
        "projector": build_head([48, 32, 32, 16], state, "projector_patch."),
        "predictor": build_head([16, 32, 16], state, "predictor_patch."),
    }
    rng = np.random.default_rng(5)

    def draw(*shape: int) -> Tensor:
        return torch.from_numpy(rng.standard_normal(shape, np.float32))

    tokens = draw(2, 196, 48)
    for window in (2, 7):
        np.testing.assert_allclose(
            pool_patches(tokens, window), checks[f"P5/{window}"], atol=1e-6, rtol=0
        )
    images = draw(2, 3, 224, 224)
    with torch.no_grad():
        every_7th = backbone.norm(backbone.tokens(images))[:, ::7]
        np.testing.assert_allclose(every_7th, checks["P6/tokens"], atol=1e-5, rtol=0)
        projected = heads["projector"](draw(80, 48))
        predicted = heads["predictor"](projected)
    np.testing.assert_allclose(projected, checks["P8/projected"], atol=1e-5, rtol=0)
    np.testing.assert_allclose(predicted, checks["P8/predicted"], atol=1e-5, rtol=0)
    for rows in (projected, predicted):
        torch.testing.assert_close(rows.mean(0), torch.zeros(16), atol=1e-6, rtol=0)
        torch.testing.assert_close(rows.var(0, correction=0), torch.ones(16), atol=1e-3, rtol=0)


def test_positions(checks: dict[str, np.ndarray]) -> None:
    positions = build_sincos_positions(14, 384)[0]
    np.testing.assert_allclose(positions[::15], checks["P7/positions"], atol=2e-6, rtol=0)
    assert not positions[0].any()
    row = positions[1:].view(14, 14, 384)
    assert (row[:, :, :96] == row[:, :1, :96]).all()


def test_its_backbones_are_imported(golden: Golden, method: Mgc) -> None:
    """From the full checkpoint, and from the file with the bare state dict."""
    images = golden.views(0, {}, blocks=4).large[0]
    for which, network in (("teacher", method.teacher), ("student", method.student)):
        expected = network.backbone.cls_feature(images)
        for checkpoint in (golden.checkpoint, golden.checkpoint["state_dict"]):
            state, left_out = extract_backbone_state(checkpoint, which)
            vit = build_vit(method.config.arch)
            load_strictly(vit, state, "file")
            if checkpoint is not golden.checkpoint:
                assert len(left_out) + len(state) == len(checkpoint)
            torch.testing.assert_close(vit.cls_feature(images), expected, atol=5e-6, rtol=0)


def test_eight_heads_are_not_loaded_into_six(golden: Golden, method: Mgc, tmp_path: Path) -> None:
    """Nor with other positions, from a full file and from one with the backbone alone."""
    six = build_vit(replace(method.config.arch, num_heads=6, positions="learned"))
    for state in (golden.checkpoint, method.teacher.backbone.state_dict()):
        torch.save(state, tmp_path / "weights.pth")
        with pytest.raises(WeightsError, match="another number of heads"):
            load_released_backbone(six, tmp_path / "weights.pth")
    six = build_vit(six.config)
    torch.save(six.state_dict(), tmp_path / "weights.pth")
    with pytest.raises(WeightsError, match="positions are learned"):
        load_released_backbone(build_vit(method.config.arch), tmp_path / "weights.pth")
