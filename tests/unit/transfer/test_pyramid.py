"""The pyramid of a ViT, against its pieces written out, and batch normalization over ranks."""

import warnings
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from ranks import spawn
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from mugs import distributed
from mugs.models.batch_norm import AllRanksBatchNorm2d
from mugs.models.config import ViTConfig
from mugs.models.vit import build_vit, resize_position_table
from mugs.transfer.pyramid import Pyramid, tapped_blocks

TINY = ViTConfig(embed_dim=24, depth=6, num_heads=2, patch_size=8, image_size=32)


@pytest.mark.parametrize(
    ("depth", "expected"), [(12, (3, 5, 7, 11)), (24, (7, 11, 15, 23)), (3, (0, 1, 1, 2))]
)
def test_blocks(depth: int, expected: tuple[int, ...]) -> None:
    assert tapped_blocks(depth) == expected


@pytest.mark.parametrize("normed", [False, True])
def test_forward_is_its_pieces(normed: bool) -> None:
    torch.manual_seed(0)
    pyramid = Pyramid(build_vit(TINY), normed=normed).eval()
    nn.init.normal_(pyramid.vit.norm.weight)
    images = torch.randn(2, 3, 32, 48)
    x, outputs = pyramid.vit._pos_embed(pyramid.vit.patch_embed(images)), []
    for block in pyramid.vit.blocks:
        x = block(x)
        outputs.append(pyramid.vit.norm(x) if normed else x)
    maps = [outputs[i][:, 1:].unflatten(1, (4, 6)).permute(0, 3, 1, 2) for i in (1, 2, 3, 5)]
    first, norm, _, second = pyramid.scales[0]
    deconv = pyramid.scales[1]
    up = F.gelu(norm(F.conv_transpose2d(maps[0], first.weight, first.bias, stride=2)))
    expected = [
        F.conv_transpose2d(up, second.weight, second.bias, stride=2),
        F.conv_transpose2d(maps[1], deconv.weight, deconv.bias, stride=2),
        maps[2],
        maps[3].unflatten(2, (2, 2)).unflatten(4, (3, 2)).amax(dim=(3, 5)),
    ]
    assert pyramid.strides == (2, 4, 8, 16)
    for got, want in zip(pyramid(images), expected, strict=True):
        torch.testing.assert_close(got, want)


@pytest.mark.parametrize("normed", [False, True])
def test_every_trained_parameter_gets_a_gradient(normed: bool) -> None:
    pyramid = Pyramid(build_vit(TINY), normed=normed)
    sum(m.square().sum() for m in pyramid(torch.randn(1, 3, 32, 32))).backward()
    assert [n for n, p in pyramid.named_parameters() if p.requires_grad and p.grad is None] == []


def test_fixed_positions_are_trained_in_dense_tasks() -> None:
    """LayerNorm keeps the epsilon of the pretraining, which the release changes."""
    shape = replace(TINY, positions="sincos")
    pyramid = Pyramid(build_vit(shape).requires_grad_(True), normed=True)
    # To the size it has: the values stay.
    before = pyramid.vit.pos_embed.detach().clone()
    pyramid.vit.set_position_grid(4, 4)
    assert torch.equal(pyramid.vit.pos_embed, before)
    sum(m.square().sum() for m in pyramid(torch.randn(1, 3, 48, 32))).backward()
    assert pyramid.vit.pos_embed.grad is not None and pyramid.vit.pos_embed.grad.abs().min() > 0
    assert {m.eps for m in pyramid.vit.modules() if isinstance(m, nn.LayerNorm)} == {1e-6}


def test_positions_of_a_dense_task() -> None:
    vit = build_vit(TINY)
    before = vit.pos_embed.detach().clone()
    vit.set_position_grid(5, 7)
    grid = before[:, 1:].reshape(1, 4, 4, 24).permute(0, 3, 1, 2)
    want = F.interpolate(grid, size=(5, 7), mode="bicubic").flatten(2).transpose(1, 2)
    assert torch.equal(vit.pos_embed[:, 1:], want) and torch.equal(
        vit.pos_embed[:, :1], before[:, :1]
    )
    assert vit.pos_embed.requires_grad and vit.pos_embed.is_leaf
    # at another size the released rule applies, to a table that is not square
    again = resize_position_table(vit.pos_embed, 6, 9, vit.position_grid)
    table = vit.pos_embed[:, 1:].reshape(1, 5, 7, 24).permute(0, 3, 1, 2)
    want = F.interpolate(
        table, scale_factor=(6.1 / 5, 9.1 / 7), mode="bicubic", recompute_scale_factor=False
    )
    torch.testing.assert_close(again[:, 1:], want.flatten(2).transpose(1, 2))
    assert vit.tokens(torch.randn(1, 3, 48, 72)).shape == (1, 55, 24)


def batch() -> torch.Tensor:
    return (
        torch.randn(
            4, 6, 5, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64
        ).float()
        * 2
        + 1
    )


def norm_with_gradients(norm: nn.Module, x: torch.Tensor, scale: float) -> list[torch.Tensor]:
    x = x.clone().requires_grad_()
    (norm(x).pow(3).mean() * scale).backward()
    inner = norm.module if isinstance(norm, DistributedDataParallel) else norm
    return [x.grad, inner.weight.grad, inner.bias.grad, inner.running_mean, inner.running_var]


def on_rank(rank: int, folder: Path) -> None:
    warnings.simplefilter("error")
    norm = distributed.wrap_data_parallel(AllRanksBatchNorm2d(6))
    got = norm_with_gradients(norm, batch()[2 * rank : 2 * rank + 2], 1.0)
    torch.save(got, folder / f"{rank}.pt")


@pytest.mark.slow
def test_batch_norm_of_two_ranks_is_that_of_the_whole_batch(tmp_path: Path) -> None:
    spawn(on_rank, 2, tmp_path)
    ranks = [torch.load(tmp_path / f"{rank}.pt") for rank in (0, 1)]
    want = norm_with_gradients(nn.BatchNorm2d(6), batch(), 1.0)
    torch.testing.assert_close(
        torch.cat([ranks[0][0], ranks[1][0]]) / 2, want[0]
    )  # each rank's mean is of half
    for index in (1, 2, 3, 4):
        assert torch.equal(ranks[0][index], ranks[1][index])
        torch.testing.assert_close(ranks[0][index], want[index])


def test_batch_norm_of_one_rank_is_torch() -> None:
    for got, want in zip(
        norm_with_gradients(AllRanksBatchNorm2d(6), batch(), 1.0),
        norm_with_gradients(nn.BatchNorm2d(6), batch(), 1.0),
        strict=True,
    ):
        assert torch.equal(got, want)
