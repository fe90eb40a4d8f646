"""Semantic segmentation: UPerNet with an auxiliary FCN head, and a linear layer on a frozen ViT."""
