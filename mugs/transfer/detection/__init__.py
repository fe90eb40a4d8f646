"""Cascade Mask R-CNN, and Mask R-CNN, on a plain ViT."""
