"""Shapes of the networks."""

from dataclasses import dataclass
from typing import Literal

from pipeline.settings import Settings

HeadNorm = Literal["none", "batch"]
PredictorInit = Literal["released", "0.02"]
Activation = Literal["gelu", "relu"]
PointerRule = Literal["released", "fifo"]


@dataclass(frozen=True, kw_only=True)
class ViTConfig(Settings):
    """Shape of a plain pre-norm ViT (the paper's: patch 16, MLP ratio 4, exact GELU, qkv bias)."""

    embed_dim: int
    depth: int
    num_heads: int
    patch_size: int = 16
    image_size: int = 224
    # "sincos": fixed, two-dimensional sines and cosines, which are not trained.
    positions: Literal["learned", "sincos"] = "learned"


ARCHITECTURES: dict[str, ViTConfig] = {
    "vit_s16": ViTConfig(embed_dim=384, depth=12, num_heads=6),
    # As vit_s16 with 8 heads (MGC) and with 12 (MoCo-v3). The weights of one load into the other
    # without an error.
    "vit_s16_h8": ViTConfig(embed_dim=384, depth=12, num_heads=8, positions="sincos"),
    "vit_s16_h12": ViTConfig(embed_dim=384, depth=12, num_heads=12, positions="sincos"),
    "vit_b16": ViTConfig(embed_dim=768, depth=12, num_heads=12),
    # As vit_b16 with the fixed positions of MoCo-v3.
    "vit_b16_sincos": ViTConfig(embed_dim=768, depth=12, num_heads=12, positions="sincos"),
    "vit_l16": ViTConfig(embed_dim=1024, depth=24, num_heads=16),
    # Not in the paper: patches of 8 pixels, which DINO has as well (M35).
    "vit_s8": ViTConfig(embed_dim=384, depth=12, num_heads=6, patch_size=8),
    "vit_b8": ViTConfig(embed_dim=768, depth=12, num_heads=12, patch_size=8),
    # Not in the paper: small enough for a CPU, with images of 32 pixels.
    "vit_mini": ViTConfig(embed_dim=96, depth=3, num_heads=3, patch_size=8, image_size=32),
}
