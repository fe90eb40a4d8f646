"""Batch normalization: torch's with batch statistics."""

import pytest
import torch

from mugs.models.batch_norm import AllRanksBatchNorm
from mugs.models.heads import GroupHead, InfoNCEHead


def test_equals_torch() -> None:
    x = torch.randn(16, 6, generator=torch.Generator().manual_seed(0)) * 3 + 1
    theirs = torch.nn.BatchNorm1d(6).train()
    torch.testing.assert_close(AllRanksBatchNorm(6)(x), theirs(x))


@pytest.mark.parametrize("head", [InfoNCEHead, GroupHead])
def test_only_the_hidden_layers_of_the_projector_get_it(head: type[torch.nn.Module]) -> None:
    assert not any(isinstance(m, AllRanksBatchNorm) for m in head(8, hidden=4, out=4).modules())
    kinds = [type(m).__name__ for m in head(8, hidden=4, out=4, norm="batch").projector]
    assert kinds == 2 * ["Linear", "AllRanksBatchNorm", "GELU"] + ["Linear"]
