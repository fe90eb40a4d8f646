"""Networks: the ViT, heads, and the memory of neighbours."""

from mugs.models.vit import ARCHITECTURES, ViT, ViTConfig, build_vit

__all__ = ["ARCHITECTURES", "ViT", "ViTConfig", "build_vit"]
