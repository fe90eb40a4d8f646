"""Supervised fine-tuning of a pretrained backbone: ImageNet, few labels, other data sets."""
