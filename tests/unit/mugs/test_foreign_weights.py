"""Released checkpoints and timm ViTs become our backbone with the same features,
or the keys that differ are named.
"""

import argparse
import hashlib
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest
import timm
import torch
from safetensors.torch import load_file, save_file

from mugs.data.views.config import IMAGENET_MEAN, IMAGENET_STD
from mugs.models.config import ARCHITECTURES
from mugs.models.vit import build_vit
from mugs.weights.backbone_file import write_backbone_file
from mugs.weights.foreign import import_released, import_timm
from mugs.weights.pickle_file import WeightsError

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
    [("vit_s16", True), ("vit_s16", False), pytest.param("vit_b16", True, marks=pytest.mark.slow)],
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
