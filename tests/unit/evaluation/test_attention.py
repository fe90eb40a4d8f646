"""Attention of the class token equals what the block itself computes; the pictures show what their
caption says.
"""

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from mugs.data.dense.pictures import GAP, label_colors
from mugs.data.sources.folder import FolderSource
from mugs.evaluation.attention import (
    RAMP,
    STRIP_HEIGHT,
    TILE_SIDE,
    arrange_in_grid,
    colorize_map,
    compose_attention_picture,
    draw_attention,
    label_strongest_head,
    select_top_mass,
)
from mugs.models.config import ViTConfig
from mugs.models.vit import ViT, build_vit

MAPS = np.array([[[0.4, 0.3], [0.2, 0.1]], [[0.05, 0.35], [0.5, 0.0]]])


@pytest.fixture(scope="module")
def vit() -> ViT:
    torch.manual_seed(0)
    return build_vit(
        ViTConfig(embed_dim=24, depth=3, num_heads=3, patch_size=8, image_size=32)
    ).eval()


def test_it_is_the_attention_that_the_last_block_uses(vit: ViT) -> None:
    """The oracle is timm's own unfused attention: its dropout receives the weights."""
    images = torch.randn(2, 3, 48, 32)
    seen: list[torch.Tensor] = []
    attention = vit.blocks[-1].attn
    attention.fused_attn = False
    hook = attention.attn_drop.register_forward_hook(lambda _, given, __: seen.append(given[0]))
    with torch.no_grad():
        vit.cls_feature(images)
        maps = vit.class_attention(images)
    hook.remove()
    assert maps.shape == (2, 3, 6, 4)
    torch.testing.assert_close(maps.flatten(2), seen[0][:, :, 0, 1:], atol=1e-6, rtol=1e-5)
    torch.testing.assert_close(maps.sum(dim=(2, 3)), 1 - seen[0][:, :, 0, 0], atol=1e-5, rtol=0)


def test_the_fewest_patches_that_hold_the_share() -> None:
    assert select_top_mass(MAPS, 0.6).tolist() == [
        [[True, True], [False, False]],
        [[False, True], [True, False]],
    ]
    assert select_top_mass(MAPS, 0.71)[0].sum() == 3 and select_top_mass(MAPS, 0.01).sum() == 2
    assert select_top_mass(np.full((1, 2, 2), 0.25), 0.5).tolist() == [
        [[True, True], [False, False]]
    ]  # equal ones: in order
    assert select_top_mass(MAPS * 7, 0.6).tolist() == select_top_mass(MAPS, 0.6).tolist()


def test_where_heads_meet_the_one_that_attends_most_is_shown() -> None:
    assert label_strongest_head(MAPS, 0.6).tolist() == [[1, 2], [2, 0]]


def test_colors_of_a_map() -> None:
    assert colorize_map(np.array([[0.0, 0.5, 1.0, 2.0]]))[0].tolist() == [
        list(RAMP[i]) for i in (0, 1, 2, 4)
    ]
    assert colorize_map(np.zeros((1, 1))).tolist() == [[list(RAMP[0])]]


def test_tiles_are_image_combined_map_and_heads() -> None:
    shown = compose_attention_picture(np.full((32, 32, 3), 90, np.uint8), MAPS, 0.6)
    assert shown.shape == (TILE_SIDE + STRIP_HEIGHT, 4 * TILE_SIDE + 3 * GAP, 3)
    corner = [shown[2, (TILE_SIDE + GAP) * tile + 2].tolist() for tile in range(4)]
    mixed = (0.6 * label_colors()[1] + 0.4 * 90).round().astype(int).tolist()
    assert corner == [[90, 90, 90], mixed, list(RAMP[4]), colorize_map(MAPS[1])[0, 0].tolist()]
    assert [shown[-1, (TILE_SIDE + GAP) * tile].tolist() for tile in (2, 3)] == label_colors()[
        1:3
    ].tolist()
    blank = [np.zeros((5, 6, 3), np.uint8)] * 14
    assert arrange_in_grid(blank).shape == (5 * 2 + GAP, 7 * 6 + 6 * GAP, 3)


def test_a_picture_for_each_image(vit: ViT, tmp_path: Path) -> None:
    (tmp_path / "images/a").mkdir(parents=True)
    for index, color in enumerate(("red", "teal", "white")):
        Image.new("RGB", (40, 50), color).save(tmp_path / f"images/a/{index}.png")
    source = FolderSource(tmp_path / "images")
    cpu = torch.device("cpu")
    draw_attention(vit, source, [2, 1], tmp_path / "out", resize=32, crop=32, keep=0.6, device=cpu)
    found = sorted((tmp_path / "out").iterdir())
    assert [path.name for path in found] == ["image_000001.png", "image_000002.png"]
    assert [Image.open(path).getpixel((9, 9)) for path in found] == [(0, 128, 128), (255, 255, 255)]
