"""Networks: the ViT, heads, and the memory of neighbors."""
