"""Semantic segmentation: UPerNet, Semantic FPN, and a linear layer on a frozen ViT."""
