"""Batch normalization: torch's with batch statistics."""

import pytest
import torch
from ranks import spawn

from mugs import distributed
from mugs.models.batch_norm import AllRanksBatchNorm
from mugs.models.heads import GroupHead, InfoNCEHead, build_mlp


def test_equals_torch() -> None:
    x = torch.randn(16, 6, generator=torch.Generator().manual_seed(0)) * 3 + 1
    theirs = torch.nn.BatchNorm1d(6).train()
    torch.testing.assert_close(AllRanksBatchNorm(6)(x), theirs(x))
    bare = AllRanksBatchNorm(6, affine=False)
    torch.testing.assert_close(bare(x), theirs(x))
    assert not list(bare.parameters())


def on_rank(_rank: int) -> None:
    """Statistics are those of all ranks, with and without weight and bias."""
    x = torch.randn(16, 6, generator=torch.Generator().manual_seed(0)) * 3 + 1
    mine = x[8 * distributed.rank() :][:8]
    for affine in (True, False):
        expected = torch.nn.BatchNorm1d(6, affine=affine).train()(x)[8 * distributed.rank() :][:8]
        torch.testing.assert_close(AllRanksBatchNorm(6, affine=affine)(mine), expected)


def test_two_ranks() -> None:
    spawn(on_rank, 2)


def test_an_mlp_may_end_with_it() -> None:
    mlp = build_mlp([8, 4, 3], bias=False, norm="batch", activation="relu", norm_output=True)
    kinds = [type(m).__name__ for m in mlp]
    assert kinds == ["Linear", "AllRanksBatchNorm", "ReLU", "Linear", "AllRanksBatchNorm"]
    assert [name for name, _ in mlp.named_parameters()] == [
        "0.weight",
        "1.weight",
        "1.bias",
        "3.weight",
    ]


@pytest.mark.parametrize("head", [InfoNCEHead, GroupHead])
def test_only_the_hidden_layers_of_the_projector_get_it(head: type[torch.nn.Module]) -> None:
    assert not any(isinstance(m, AllRanksBatchNorm) for m in head(8, hidden=4, out=4).modules())
    kinds = [type(m).__name__ for m in head(8, hidden=4, out=4, norm="batch").projector]
    assert kinds == 2 * ["Linear", "AllRanksBatchNorm", "GELU"] + ["Linear"]


def test_a_flop_count_may_have_a_single_row() -> None:
    """A level of one pair per image is counted on one image."""
    row = torch.zeros(1, 3, device="meta")
    assert AllRanksBatchNorm(3).to("meta")(row).shape == (1, 3)
