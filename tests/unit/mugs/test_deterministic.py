"""With `deterministic`, a pretraining uses repeatable kernels; the numbers stay to rounding."""

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from step_cases import SMALLEST, float64

from mugs.data.sources.folder import FolderSource
from mugs.data.views.config import ViewRecipe
from mugs.methods.mugs import Mugs
from mugs.models.vit import resize_by_product, resize_position_table
from mugs.pretrain.config import TrainConfig
from mugs.pretrain.train import PretrainTask


@pytest.fixture
def restored() -> Iterator[None]:
    yield
    torch.use_deterministic_algorithms(False)


@pytest.mark.parametrize(("height", "width"), [(6, 6), (14, 14), (3, 5)])
def test_the_product_is_the_resize(height: int, width: int) -> None:
    with float64():
        table = torch.randn(1, 197, 8, requires_grad=True)
        ours, theirs = (
            resize(table, height, width, (14, 14))
            for resize in (resize_by_product, resize_position_table)
        )
        torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-12)
        direction = torch.randn_like(ours)
        mine, other = (torch.autograd.grad((x * direction).sum(), table)[0] for x in (ours, theirs))
        torch.testing.assert_close(mine, other, rtol=1e-12, atol=1e-12)


@pytest.mark.usefixtures("restored")
@pytest.mark.parametrize("chosen", [True, False])
def test_the_setting_reaches_torch_and_both_networks(
    chosen: bool, digits: FolderSource, tmp_path: Path
) -> None:
    config = TrainConfig(
        epochs=1,
        batch_size=4,
        base_lr=1e-3,
        views=ViewRecipe(large_size=32, small_size=16, num_small=2),
        deterministic=chosen,
    )
    method = Mugs(SMALLEST)
    PretrainTask(method, digits, config, tmp_path, torch.device("cpu"))
    assert torch.are_deterministic_algorithms_enabled() == chosen
    for network in (method.student, method.teacher):
        assert network.backbone.resize_by_product == chosen
