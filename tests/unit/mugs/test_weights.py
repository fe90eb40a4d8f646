"""Weights of releases and timm become our backbone with the same features, or what does not fit is
named; the same for those that we export.
"""

import argparse
import hashlib
import os
import re
import zipfile
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import timm
import torch
from safetensors.torch import load_file, save_file
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor

from mugs.data.views.config import IMAGENET_MEAN, IMAGENET_STD
from mugs.models.config import ARCHITECTURES, ViTConfig
from mugs.models.vit import ViT, build_vit
from mugs.weights.backbone_file import (
    extract_backbone_state,
    load_backbone,
    load_released_backbone,
    load_strictly,
    read_backbone_file,
    write_backbone_file,
)
from mugs.weights.foreign import import_released, import_timm, load_timm_file, verify_sha256
from mugs.weights.pickle_file import WeightsError, read_released_checkpoint

INIT = Path(__file__).parents[2] / "parity" / "golden" / "init.pth"
TINY = ViTConfig(embed_dim=48, depth=3, num_heads=3)


@pytest.mark.parametrize("which", ["teacher", "student"])
def test_full_checkpoint(which: str) -> None:
    vit = build_vit(TINY)
    assert any("relation_blocks" in key for key in load_released_backbone(vit, INIT, which))
    prefix = "module.backbone." if which == "student" else "backbone."
    assert torch.equal(
        vit.norm.weight, read_released_checkpoint(INIT)[which][prefix + "norm.weight"]
    )


@pytest.mark.parametrize("prefix", ["", "module.", "module.backbone."])
def test_backbone_only_checkpoint(tmp_path: Path, prefix: str) -> None:
    state, _ = extract_backbone_state(read_released_checkpoint(INIT))
    torch.save({prefix + k: v for k, v in state.items()}, tmp_path / "b.pth")
    vit = build_vit(TINY)
    assert load_released_backbone(vit, tmp_path / "b.pth") == ()
    assert torch.equal(vit.pos_embed, state["pos_embed"])


def test_missing_keys_are_an_error(tmp_path: Path) -> None:
    state, _ = extract_backbone_state(read_released_checkpoint(INIT))
    state.pop("norm.weight")
    torch.save(state, tmp_path / "b.pth")
    with pytest.raises(WeightsError, match=r"b\.pth.*norm\.weight"):
        load_released_backbone(build_vit(TINY), tmp_path / "b.pth")


def put(value: float) -> Callable[[Tensor], Tensor]:
    """Return what puts a value into a tensor."""
    return lambda tensor: tensor.clone().index_fill_(0, torch.tensor([0]), value)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        # Quantized: torch would take the whole numbers for the weights.
        (lambda tensor: (tensor * 100).to(torch.int8), "1 of int8 instead of floating point"),
        (lambda tensor: tensor > 0, "1 of bool instead of floating point"),
        (lambda tensor: tensor.to(torch.complex64), "1 of complex64 instead of"),
        (put(float("nan")), "1 with values that are infinite or not a number"),
        (put(float("inf")), "1 with values that are infinite or not a number"),
        (lambda tensor: tensor.to_sparse(), "1 without plain values"),
        (lambda tensor: tensor.to("meta"), "1 without plain values"),
        (lambda tensor: tensor.half(), ""),
        (lambda tensor: tensor.double(), ""),
    ],
)
def test_what_torch_would_convert_is_refused(
    change: Callable[[Tensor], Tensor], words: str
) -> None:
    state = dict(build_vit(TINY).state_dict())
    state["norm.weight"] = change(state["norm.weight"])
    with pytest.raises(WeightsError, match=words) if words else nullcontext():
        load_strictly(build_vit(TINY), state, "x")


@pytest.mark.parametrize("wrapper", ["state_dict", "model"])
def test_an_average_beside_a_network_is_not_left_out(tmp_path: Path, wrapper: str) -> None:
    """Other programs evaluate the average of such a file."""
    state = build_vit(TINY).state_dict()
    torch.save({wrapper: state, f"{wrapper}_ema": state}, tmp_path / "b.pth")
    with pytest.raises(WeightsError, match=f"two networks, {wrapper} and {wrapper}_ema"):
        load_released_backbone(build_vit(TINY), tmp_path / "b.pth")


def after_a_step() -> dict[str, Any]:
    """A full checkpoint as the release saves it: rates are NumPy scalars once a step was made."""
    checkpoint = read_released_checkpoint(INIT)
    group = {"lr": np.float64(1.5e-4), "weight_decay": np.float64(0.04), "betas": (0.9, 0.999)}
    numbers = [np.int64(-3), np.float32(0.5), np.bool_(True)]
    return {**checkpoint, "optimizer": {"param_groups": [group], "state": {0: numbers}}}


@pytest.mark.parametrize("numpy_1", [False, True])
def test_a_checkpoint_with_numpy_scalars(tmp_path: Path, numpy_1: bool) -> None:
    path = tmp_path / "step.pth"
    torch.save(after_a_step(), path)
    if numpy_1:
        rename_in_zip(path, b"numpy._core.multiarray", b"numpy.core.multiarray")
    content = read_released_checkpoint(path)
    group = content["optimizer"]["param_groups"][0]
    assert (group["lr"], group["weight_decay"]) == (1.5e-4, 0.04)
    assert content["optimizer"]["state"][0] == [-3, 0.5, True]
    vit, expected = build_vit(TINY), build_vit(TINY)
    load_released_backbone(vit, path)
    load_released_backbone(expected, INIT)
    image = torch.rand(1, 3, 224, 224)
    assert torch.equal(vit.cls_feature(image), expected.cls_feature(image))


def rename_in_zip(path: Path, old: bytes, new: bytes) -> None:
    """Write a checkpoint again with another name in its pickle, where names end with a line."""
    with zipfile.ZipFile(path) as archive:
        files = {name: archive.read(name) for name in archive.namelist()}
    with zipfile.ZipFile(path, "w") as archive:
        for name, content in files.items():
            archive.writestr(name, content.replace(old, new))


@pytest.mark.parametrize(
    ("dtype", "data"),
    [("O", b"x" * 8), ("V8", b"x" * 8), ([("a", "O")], b"x" * 8), ("f8", b"x")],
)
def test_numpy_scalars_of_other_kinds_are_refused(tmp_path: Path, dtype: Any, data: bytes) -> None:
    class Hostile:
        def __reduce__(self) -> Any:
            return scalar, (np.dtype(dtype), data)

    scalar = getattr(np._core.multiarray, "scalar")  # noqa: B009 (no stub has it)
    torch.save({"teacher": {}, "x": Hostile()}, tmp_path / "x.pth")
    with pytest.raises(WeightsError, match=r"x\.pth: (refused|damaged)"):
        read_released_checkpoint(tmp_path / "x.pth")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"<!DOCTYPE html><html>Virus scan warning</html>", "is a web page"),
        (b"\n <HTML>", "is a web page"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:abc\n", "is a Git LFS pointer"),
        (b"PAR1abc", "is not a PyTorch file, it begins with b'PAR1abc'"),
        (b"", "is not a PyTorch file"),
    ],
)
def test_what_a_failed_download_left_is_named(tmp_path: Path, content: bytes, message: str) -> None:
    (tmp_path / "x.pth").write_bytes(content)
    with pytest.raises(WeightsError, match=rf"x\.pth: {re.escape(message)}"):
        read_released_checkpoint(tmp_path / "x.pth")


def test_the_class_of_a_refused_object_is_named(tmp_path: Path) -> None:
    torch.save({"teacher": {}, "path": tmp_path}, tmp_path / "x.pth")
    with pytest.raises(WeightsError, match=r"it holds `pathlib\.\S*PosixPath`") as caught:
        read_released_checkpoint(tmp_path / "x.pth")
    assert "weights_only" not in str(caught.value)


@pytest.mark.parametrize("prefix", ["_orig_mod.", "module._orig_mod.", "_orig_mod.module."])
@pytest.mark.parametrize("inner", ["", "backbone."])
@pytest.mark.parametrize("wrapper", [None, "model", "state_dict", "teacher"])
def test_prefixes_of_wrappers_are_removed(
    tmp_path: Path, prefix: str, inner: str, wrapper: str | None
) -> None:
    state, _ = extract_backbone_state(read_released_checkpoint(INIT))
    content = {f"{prefix}{inner}{key}": value for key, value in state.items()}
    torch.save({wrapper: content} if wrapper else content, tmp_path / "x.pth")
    vit = build_vit(TINY)
    assert load_released_backbone(vit, tmp_path / "x.pth") == ()
    assert torch.equal(vit.norm.weight, state["norm.weight"])


# What released checkpoints hold besides the two encoders.
HEADS = {"MoCo-v3": "{}_encoder.head.0.weight", "MGC": "projector_patch.0.weight"}


def two_encoders(config: ViTConfig, method: str) -> tuple[dict[str, Any], dict[str, ViT]]:
    """A full checkpoint of two encoders in one state dict, and the encoders by our names."""
    encoders = {"student": build_vit(config), "teacher": build_vit(config)}
    state = {"module.predictor.0.weight": torch.zeros(2, 2)}
    for ours, theirs in (("student", "base"), ("teacher", "momentum")):
        prefix = f"module.{theirs}_encoder."
        state |= {prefix + key: value for key, value in encoders[ours].state_dict().items()}
        state["module." + HEADS[method].format(theirs)] = torch.zeros(2, 2)
    return {"epoch": 300, "arch": "vit_small", "state_dict": state, "optimizer": {}}, encoders


@pytest.mark.parametrize(("arch", "method"), [("vit_s16_h12", "MoCo-v3"), ("vit_s16_h8", "MGC")])
def test_two_encoders_in_one_state(tmp_path: Path, arch: str, method: str) -> None:
    """Each is loaded by its name, and their heads are left out; not into other heads in silence."""
    config = replace(ARCHITECTURES[arch], depth=1)
    content, encoders = two_encoders(config, method)
    torch.save(content, tmp_path / "x.pth.tar")
    images = torch.randn(1, 3, 224, 224)
    for which, encoder in encoders.items():
        vit = build_vit(config)
        assert load_released_backbone(vit, tmp_path / "x.pth.tar", which)
        assert torch.equal(vit.cls_feature(images), encoder.cls_feature(images))
    other = build_vit(replace(config, num_heads=20 - config.num_heads))
    words = rf"those of {method}, .* {config.num_heads} heads, .* has {20 - config.num_heads}; set"
    with pytest.raises(WeightsError, match=words):
        load_released_backbone(other, tmp_path / "x.pth.tar")


def tiny_timm_vit() -> VisionTransformer:
    return VisionTransformer(img_size=32, embed_dim=48, depth=1, num_heads=3, num_classes=0)


@pytest.mark.parametrize("prefix", ["_orig_mod.", "module.", "module._orig_mod."])
def test_prefixes_of_wrappers_are_removed_from_safetensors(tmp_path: Path, prefix: str) -> None:
    state = tiny_timm_vit().state_dict()
    path = tmp_path / "x.safetensors"
    save_file({f"{prefix}{key}": value for key, value in state.items()}, path)
    model = tiny_timm_vit()
    assert load_timm_file(model, path) == ()
    assert torch.equal(model.blocks[0].attn.qkv.weight, state["blocks.0.attn.qkv.weight"])


def test_a_student_alone_is_no_file_of_timm(tmp_path: Path) -> None:
    torch.save({"student": tiny_timm_vit().state_dict()}, tmp_path / "x.pth")
    words = r"x\.pth: has no teacher, only a student; ask for network student of source mugs"
    with pytest.raises(WeightsError, match=words):
        load_timm_file(tiny_timm_vit(), tmp_path / "x.pth")


@pytest.mark.parametrize(("asked", "there"), [("teacher", "student"), ("student", "teacher")])
def test_the_other_network_is_not_taken_instead(tmp_path: Path, asked: Any, there: str) -> None:
    state, _ = extract_backbone_state(read_released_checkpoint(INIT))
    torch.save({there: state}, tmp_path / "x.pth")
    with pytest.raises(WeightsError, match=rf"x\.pth: has no {asked}, only a {there}"):
        load_released_backbone(build_vit(TINY), tmp_path / "x.pth", asked)


@pytest.mark.parametrize(
    ("keys", "name"),
    [
        ("encoder.layer.{}.attention.attention.query.weight", "Hugging Face transformers"),
        ("encoder.layers.encoder_layer_{}.ln_1.weight", "torchvision"),
        ("visual.transformer.resblocks.{}.ln_1.weight", "CLIP"),
    ],
)
def test_weights_of_other_libraries_are_told_in_a_short_line(
    tmp_path: Path, keys: str, name: str
) -> None:
    torch.save({keys.format(index): torch.zeros(3) for index in range(400)}, tmp_path / "x.pth")
    with pytest.raises(
        WeightsError, match=f"400 unexpected .*they look like weights of {name}"
    ) as e:
        load_released_backbone(build_vit(TINY), tmp_path / "x.pth")
    assert len(str(e.value)) < 600 + len(str(tmp_path))
    assert e.value.details.count("unexpected: ") == 400


def test_a_key_of_its_own_is_not_lost_among_those_of_blocks() -> None:
    state = dict(build_vit(TINY).state_dict())
    state |= {f"blocks.{i}.ls{j}.gamma": torch.ones(48) for i in range(3) for j in (1, 2)}
    state["reg_token"] = torch.ones(1, 4, 48)
    words = r"7 unexpected \(reg_token, blocks\.\*\.ls1\.gamma, blocks\.\*\.ls2\.gamma\)"
    with pytest.raises(WeightsError, match=words):
        load_strictly(build_vit(TINY), state, "x")


def test_a_wrong_shape_is_named_with_both_shapes() -> None:
    state = dict(build_vit(TINY).state_dict())
    state["pos_embed"] = torch.zeros(1, 577, 48)
    with pytest.raises(WeightsError, match=r"pos_embed is \[1, 577, 48\] and not \[1, 197, 48\]"):
        load_strictly(build_vit(TINY), state, "x")


def test_export_round_trip(tmp_path: Path) -> None:
    vit = build_vit(TINY)
    write_backbone_file(tmp_path / "x.safetensors", vit.state_dict(), {"arch": {"embed_dim": 48}})
    state, meta = read_backbone_file(tmp_path / "x.safetensors")
    assert meta == {"arch": {"embed_dim": 48}}
    assert all(torch.equal(v, state[k]) for k, v in vit.state_dict().items())


def test_export_cut_short_is_named(tmp_path: Path) -> None:
    path = tmp_path / "x.safetensors"
    write_backbone_file(path, build_vit(TINY).state_dict(), {"arch": {}})
    os.truncate(path, 1000)
    with pytest.raises(WeightsError, match=r"x\.safetensors"):
        read_backbone_file(path)


@pytest.mark.parametrize(
    ("said", "message"),
    [
        ({"depth": 1_000_000}, "says depth 1000000, but has 3 blocks"),
        ({"image_size": 448}, r"pos_embed is \[1, 785, 48\], but it is \[1, 197, 48\]"),
        ({"num_heads": 5}, "of no possible shape"),
    ],
)
def test_a_shape_that_is_not_the_tensors_is_refused(
    tmp_path: Path, said: dict[str, int], message: str
) -> None:
    path = tmp_path / "x.safetensors"
    write_backbone_file(path, build_vit(TINY).state_dict(), {"arch": asdict(TINY) | said})
    with pytest.raises(WeightsError, match=message):
        load_backbone(path)


def test_a_compressed_checkpoint_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "b.pth"
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("b/data.pkl", b"\0" * 1_000_000)
    with pytest.raises(WeightsError, match=r"b\.pth: holds 'b/data\.pkl' compressed"):
        read_released_checkpoint(path)


def test_a_file_larger_than_any_weights_is_not_hashed(tmp_path: Path) -> None:
    (tmp_path / "b.pth").touch()
    os.truncate(tmp_path / "b.pth", 1 << 40)
    with pytest.raises(WeightsError, match=r"b\.pth: has 1099511627776 bytes"):
        verify_sha256(tmp_path / "b.pth", None)


TIMM = {"vit_s16": "vit_small_patch16_224.dino", "vit_b16": "vit_base_patch16_224.dino"}


def released(path: Path, arch: str, *, full: bool = True) -> Path:
    """A file in the released layout with random weights: networks with heads,
    or the backbone alone.
    """
    torch.manual_seed(0)
    state = build_vit(arch, relation_depth=1).state_dict()
    alone = {key: value for key, value in state.items() if not key.startswith("relation_blocks.")}
    teacher = {f"backbone.{key}": value for key, value in state.items()} | {
        "group_head.0.weight": torch.zeros(2, 2)
    }
    content = {
        "teacher": teacher,
        "student": {f"module.{key}": -value for key, value in teacher.items()},
        "epoch": 3,
        "args": argparse.Namespace(arch=arch),
    }
    torch.save(content if full else {"state_dict": alone}, path)
    return path


def image(
    mean: tuple[float, ...] = IMAGENET_MEAN, std: tuple[float, ...] = IMAGENET_STD
) -> torch.Tensor:
    pixels = torch.rand(1, 3, 224, 224, generator=torch.Generator().manual_seed(1))
    return (pixels - torch.tensor(mean).view(3, 1, 1)) / torch.tensor(std).view(3, 1, 1)


@pytest.mark.parametrize(
    ("arch", "full"),
    [("vit_s16", True), ("vit_s16", False), pytest.param("vit_b16", True, marks=pytest.mark.long)],
)
def test_a_released_checkpoint_through_import_to_timm(
    tmp_path: Path, arch: str, full: bool
) -> None:
    path = released(tmp_path / "released.pth", arch, full=full)
    found = import_released(arch, str(path))
    assert found.sha256 == hashlib.sha256(path.read_bytes()).hexdigest()
    assert any(key.startswith("backbone.relation_blocks") for key in found.discarded) == full
    write_backbone_file(
        tmp_path / "teacher.safetensors", dict(found.vit.state_dict()), {"arch": {}}
    )
    theirs = timm.create_model(TIMM[arch], pretrained=False, num_classes=0).eval()
    theirs.load_state_dict(load_file(tmp_path / "teacher.safetensors"), strict=True)
    with torch.no_grad():
        ours, wanted = found.vit.eval().cls_feature(image()), theirs(image())
    assert (ours - wanted).abs().max() < 1e-5 and wanted.std() > 0.1


@pytest.mark.slow
def test_the_released_layout_of_vit_l(tmp_path: Path) -> None:
    found = import_released("vit_l16", str(released(tmp_path / "l.pth", "vit_l16", full=False)))
    assert found.vit.config == ARCHITECTURES["vit_l16"]


def test_wrong_weights_stop_with_the_keys(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    small = ARCHITECTURES["vit_s16"]
    monkeypatch.setitem(ARCHITECTURES, "vit_narrow", replace(small, embed_dim=96))
    monkeypatch.setitem(ARCHITECTURES, "vit_deep", replace(small, depth=13))
    path = released(tmp_path / "r.pth", "vit_s16", full=False)
    for arch, file, words in (
        ("vit_narrow", path, r"r\.pth.*150 of another shape"),
        ("vit_deep", path, r"r\.pth.*12 missing \(blocks\.12"),
        ("vit_s16", tmp_path / "none.pth", r"none\.pth: No such file"),
    ):
        with pytest.raises(WeightsError, match=words):
            import_released(arch, str(file))
    with pytest.raises(WeightsError, match="SHA-256 [0-9a-f]+, expected 00"):  # noqa: RUF043
        import_released("vit_s16", str(path), sha256="0" * 64)


@pytest.fixture
def tiny() -> torch.nn.Module:
    """A ViT whose weights want pixels between -1 and 1."""
    torch.manual_seed(0)
    return timm.create_model("vit_tiny_patch16_224.augreg_in21k", pretrained=False).eval()


@pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
def test_a_vit_of_timm_that_is_normalised_another_way(
    tmp_path: Path, tiny: torch.nn.Module, suffix: str
) -> None:
    path = tmp_path / f"tiny{suffix}"
    for parameter in tiny.parameters():
        torch.nn.init.normal_(parameter, std=0.1)
    if suffix == ".pth":
        torch.save({"model": {**tiny.state_dict(), "epoch": 3}}, path)
    else:
        save_file(tiny.state_dict(), path)
    found = import_timm("vit_tiny_patch16_224.augreg_in21k", str(path))
    assert found.discarded == (*(["epoch"] if suffix == ".pth" else []), "head.bias", "head.weight")
    with torch.no_grad():
        wanted = tiny.forward_features(image((0.5,) * 3, (0.5,) * 3))[:, 0]
        torch.testing.assert_close(found.vit.cls_feature(image()), wanted, atol=1e-5, rtol=1e-5)
        assert (found.vit.cls_feature(image((0.5,) * 3, (0.5,) * 3)) - wanted).abs().max() > 1e-3


@pytest.mark.parametrize(
    ("arch", "words"),
    [
        ("vit_tiny_patch16_224.dino", "timm cannot make it"),
        ("resnet18", "is a ResNet of timm; expected a ViT with a class token"),
        ("vit_small_patch14_dinov2.lvd142m", "not a plain ViT.*ls1.gamma"),
    ],
)
def test_what_is_no_plain_vit_is_refused(tmp_path: Path, arch: str, words: str) -> None:
    path = tmp_path / "x.pth"
    if timm.is_model(arch.split(".")[0]) and "tiny" not in arch:
        torch.save(
            timm.create_model(arch.split(".")[0], pretrained=False, num_classes=0).state_dict(),
            path,
        )
    with pytest.raises(WeightsError, match=words):
        import_timm(arch, str(path))


def test_an_activation_that_no_key_tells(
    tmp_path: Path, tiny: torch.nn.Module, monkeypatch: pytest.MonkeyPatch
) -> None:
    for parameter in tiny.parameters():
        torch.nn.init.normal_(parameter, std=0.1)
    path = tmp_path / "tiny.safetensors"
    save_file(tiny.state_dict(), path)
    monkeypatch.setattr(timm, "create_model", partial(timm.create_model, act_layer="quick_gelu"))
    with pytest.raises(WeightsError, match="its class token differs from ours by"):
        import_timm("vit_tiny_patch16_224.augreg_in21k", str(path))
