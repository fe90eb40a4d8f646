"""Dense transfer: detection, segmentation and video around the one ViT."""
