"""Floating-point operations of a training step, by formula.

A block of width D over L tokens takes 12 L D^2 multiply-adds in its linear layers and 2 L^2 D in attention; a linear
layer takes as many per row as it has weights. A multiply-add counts as two operations, backward as twice forward.
Recomputation (activation checkpointing) is not counted, nor are norms, activations and the optimizer.
"""

from typing import Protocol

from torch import nn

from mugs.models.config import ViTConfig


class Sizes(Protocol):
    """What a step looks like."""

    @property
    def large_size(self) -> int:
        """Pixels of a large crop's side."""

    @property
    def small_size(self) -> int:
        """Pixels of a small crop's side."""

    @property
    def num_small(self) -> int:
        """Small crops per image."""


def block_macs(tokens: int, width: int) -> int:
    """Multiply-adds of one transformer block."""
    return 12 * tokens * width**2 + 2 * tokens**2 * width


def backbone_macs(config: ViTConfig, size: int) -> int:
    """Multiply-adds of one image's forward pass."""
    patches = (size // config.patch_size) ** 2
    embedding = patches * config.embed_dim * 3 * config.patch_size**2
    return embedding + config.depth * block_macs(patches + 1, config.embed_dim)


def linear_macs(head: nn.Module | None) -> int:
    """Multiply-adds of one row through the linear layers of a head; 0 without a head."""
    return (
        0
        if head is None
        else sum(p.numel() for p in head.parameters() if p.ndim == 2 and p.shape[1] > 1)
    )
