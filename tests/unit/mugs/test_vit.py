"""What pretraining methods ask of the ViT: masked patches, fixed positions."""

import math
from dataclasses import replace

import pytest
import torch

from mugs.models.config import ARCHITECTURES, ViTConfig
from mugs.models.vit import build_sincos_positions, build_vit

TINY = ViTConfig(embed_dim=24, depth=2, num_heads=2, patch_size=8, image_size=32)


def test_a_masked_patch_has_no_content() -> None:
    """Whatever its pixels are; its position, and all other patches, count as before."""
    vit = build_vit(TINY)
    images = torch.randn(3, 3, 32, 32)
    mask = torch.rand(3, 16) < 0.4
    vector = torch.randn(24)
    hidden = mask.view(3, 1, 4, 4).repeat_interleave(8, 2).repeat_interleave(8, 3)
    tokens = vit.tokens(images, (mask, vector))
    assert torch.equal(vit.tokens(torch.where(hidden, 9.0, images), (mask, vector)), tokens)
    assert not torch.equal(vit.tokens(images), tokens)
    nothing = torch.zeros_like(mask)
    assert torch.equal(vit.tokens(images, (nothing, vector)), vit.tokens(images))

    # All masked: the tokens before the first block are the vector and the positions.
    seen = []
    vit.blocks[0].register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
    vit.tokens(images, (torch.ones_like(mask), vector))
    torch.testing.assert_close(seen[0][:, 1:], (vector + vit.pos_embed[:, 1:]).expand(3, -1, -1))


def test_the_mask_vector_gets_a_gradient() -> None:
    vector = torch.zeros(1, 24, requires_grad=True)
    mask = torch.zeros(1, 16, dtype=torch.bool)
    mask[0, 3] = True
    build_vit(TINY).tokens(torch.randn(1, 3, 32, 32), (mask, vector)).sum().backward()
    assert vector.grad.abs().sum() > 0


def test_fixed_positions() -> None:
    table = build_sincos_positions(14, 384)
    assert table.shape == (1, 197, 384)
    assert not table[0, 0].any()
    row, column, frequency = 5, 9, 7
    angle = 10000 ** (-frequency / 96)
    of_patch = table[0, 1 + row * 14 + column]
    expected = [math.sin(row * angle), math.cos(row * angle)]
    expected += [math.sin(column * angle), math.cos(column * angle)]
    found = of_patch[[frequency, 96 + frequency, 192 + frequency, 288 + frequency]]
    torch.testing.assert_close(found, torch.tensor(expected))


def test_fixed_positions_are_not_trained() -> None:
    vit = build_vit("vit_s16_h8")
    assert not vit.pos_embed.requires_grad
    assert ARCHITECTURES["vit_s16_h8"].num_heads == vit.blocks[0].attn.num_heads == 8
    assert sum(p.numel() for p in vit.parameters()) == 21_665_664
    vit.set_position_grid(20, 20)
    assert not vit.pos_embed.requires_grad


@pytest.mark.parametrize("arch", ["vit_s8", "vit_b8"])
def test_patches_of_8_pixels(arch: str) -> None:
    """28 x 28 in a large crop, 12 x 12 in a small one, with positions by the released rule."""
    shape = ARCHITECTURES[arch]
    assert replace(shape, patch_size=16) == ARCHITECTURES[arch.replace("8", "16")]
    assert (shape.image_size // shape.patch_size) ** 2 == 28 * 28
    vit = build_vit(replace(shape, depth=1))
    assert vit.pos_embed.shape == (1, 1 + 28 * 28, shape.embed_dim)
    assert vit.patch_embed.proj.weight.shape[2:] == (8, 8)
    for size, side in ((224, 28), (96, 12)):
        assert vit.tokens(torch.zeros(1, 3, size, size)).shape[1] == 1 + side**2
    grid = vit.pos_embed[:, 1:].unflatten(1, (28, 28)).permute(0, 3, 1, 2)
    expected = torch.nn.functional.interpolate(
        grid, scale_factor=12.1 / 28, mode="bicubic", recompute_scale_factor=False
    )
    blank = torch.zeros(1, 12, 12, shape.embed_dim)
    found = vit._pos_embed(blank)[:, 1:].unflatten(1, (12, 12)).permute(0, 3, 1, 2)
    torch.testing.assert_close(found, expected)
