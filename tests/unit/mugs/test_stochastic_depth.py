"""Skipping the branches that stochastic depth drops changes no number, and saves the operations."""

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from step_cases import float64
from torch import Tensor

from mugs.models.config import ViTConfig
from mugs.models.flops import copy_to_meta, count_flops
from mugs.models.stochastic_depth import KeptSamples, plan_branches
from mugs.models.vit import ViT, build_vit

TINY = ViTConfig(embed_dim=24, depth=3, num_heads=2, patch_size=8, image_size=32)
CPU = torch.device("cpu")


def run(vit: ViT, images: Tensor, uniforms: Tensor, *, skip: bool) -> tuple[Tensor, list[Tensor]]:
    vit.skip_dropped = skip
    vit.set_depth_uniforms(uniforms)
    out = vit.tokens(images)
    return out, list(torch.autograd.grad(out.square().sum(), vit.blocks.parameters()))


def keep_some(uniforms: Tensor) -> Tensor:
    return uniforms


def drop_all_of_a_branch(uniforms: Tensor) -> Tensor:
    uniforms[3] = 0.99
    return uniforms


@pytest.mark.parametrize("change", [keep_some, drop_all_of_a_branch])
@pytest.mark.parametrize("activation_checkpointing", [False, True])
def test_skipped_branches_equal_masked_ones(
    change: Callable[[Tensor], Tensor], activation_checkpointing: bool
) -> None:
    with float64():
        torch.manual_seed(0)
        vit = build_vit(TINY, drop_path=0.6)
        vit.activation_checkpointing = activation_checkpointing
        images = torch.randn(7, 3, 32, 32)
        uniforms = change(torch.rand(6, 7))
        skipped, of_skipped = run(vit, images, uniforms, skip=True)
        masked, of_masked = run(vit, images, uniforms, skip=False)
        torch.testing.assert_close(skipped, masked, rtol=1e-12, atol=1e-12)
        torch.testing.assert_close(of_skipped, of_masked, rtol=1e-10, atol=1e-10)


def test_what_each_branch_does() -> None:
    uniforms = torch.tensor([[0.99, 0.1], [0.99, 0.1], [0.4, 0.6], [0.9, 0.8]])
    rates = (0.0, 0.02, 0.5, 0.5)
    whole, scaled, kept, none = plan_branches(uniforms, rates, CPU, skip_dropped=True)
    assert whole is None
    assert scaled.tolist() == pytest.approx([0.0, 1 / 0.98])
    assert isinstance(kept, KeptSamples)
    assert (kept.rows.tolist(), kept.factor) == ([0], 2.0)
    assert (none.rows.tolist(), none.factor) == ([0], 0.0)  # its parameters still get a gradient
    fixed = plan_branches(uniforms, rates, CPU, skip_dropped=False)
    assert [None if plan is None else len(plan) for plan in fixed] == [None, 2, 2, 2]


def test_the_depth_of_vit_l_computes_a_seventh_less() -> None:
    """At the released rate of 0.3, which is 0.15 in the mean of its branches."""
    vit = build_vit(replace(TINY, depth=24, image_size=224, patch_size=16), drop_path=0.3)
    twin = copy_to_meta(vit, vit)
    images = torch.empty(32, 3, 96, 96, device="meta")
    whole = count_flops(lambda: twin.tokens(images))
    twin.set_depth_uniforms(torch.rand(48, 32, generator=torch.Generator().manual_seed(0)))
    assert count_flops(lambda: twin.tokens(images)) < 0.87 * whole
