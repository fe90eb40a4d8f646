"""Released and exported weights: strict, safe, and named when they do not fit."""

import os
from pathlib import Path

import pytest
import torch

from mugs.models.config import ViTConfig
from mugs.models.vit import build_vit
from mugs.weights.backbone_file import (
    WeightsError,
    extract_backbone_state,
    load_released_backbone,
    read_backbone_file,
    read_released_checkpoint,
    write_backbone_file,
)

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
