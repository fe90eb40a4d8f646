"""Cascade Mask R-CNN on a plain ViT."""
