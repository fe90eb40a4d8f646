"""Supervised fine-tuning of a pretrained backbone: ImageNet, a share of its labels, and other data sets."""
