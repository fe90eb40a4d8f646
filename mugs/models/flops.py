"""Floating-point operations of a training step, counted by torch on the meta device.

Meta tensors have a shape and no content, so a count needs no memory and takes about two seconds,
once per run. A multiply-add counts as two operations. Convolutions, matrix products and attention
are counted; norms, activations, optimizer and EMA are not. Neither is the recomputation of
activation checkpointing: the rate in the log is that of the model, however it is executed.
"""

import copy
from collections.abc import Callable
from typing import TypeVar

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from mugs.models.vit import ViT

_Copied = TypeVar("_Copied")


def copy_to_meta(original: _Copied, *modules: nn.Module) -> _Copied:
    """Return a deep copy of `original` whose parts `modules` have their tensors on the meta device.

    The content is never copied: a copy of a ViT-L method would take several GB for a moment.
    """
    # deepcopy takes from its memo what stands for an object, and copies what is not in there.
    memo: dict[int, object] = {}
    for module in modules:
        for parameter in module.parameters():
            twin = torch.empty_like(parameter, device="meta")
            memo[id(parameter)] = nn.Parameter(twin, requires_grad=parameter.requires_grad)
        memo |= {id(buffer): torch.empty_like(buffer, device="meta") for buffer in module.buffers()}
    return copy.deepcopy(original, memo)


def count_flops(forward: Callable[[], Tensor]) -> int:
    """Return the operations of a forward pass, and of the backward pass if there is a gradient."""
    with FlopCounterMode(display=False) as counter:
        result = forward()
        if result.requires_grad:
            torch.autograd.backward(result.sum())
    return int(counter.get_total_flops())


def count_image_flops(model: nn.Module, size: int) -> int:
    """Return the operations of a training step's part of one image, `size` pixels wide and high."""
    twin = copy_to_meta(model, model)
    # Blocks that run twice would be counted twice.
    for module in twin.modules():
        if isinstance(module, ViT):
            module.activation_checkpointing = False
    return count_flops(lambda: twin(torch.empty(1, 3, size, size, device="meta")))
