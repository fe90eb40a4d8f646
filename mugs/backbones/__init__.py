"""Backbones."""

from mugs.backbones.vit import ARCHITECTURES, ViT, ViTConfig, build_vit

__all__ = ["ARCHITECTURES", "ViT", "ViTConfig", "build_vit"]
